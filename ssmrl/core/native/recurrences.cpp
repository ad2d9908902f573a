// The loops of ssmrl.core.scan, gated_scan, diagonal_scan and perceptron on the CPU, in float and double.
//
// Letters: G groups, which share their weights or have their own, T steps, B sequences, S state, H hidden, O outputs; n state blocks, m product
// blocks.
// Arrays are contiguous: sequences (G, T, B, width), weights (inner, outer) or (G, inner, outer), a mask (G, T, B).
//
// A unit of work is some sequences with the same weights through all T steps, so that weights and states stay in cache and
// threads never wait for each other between steps. The functions of OpenMP come from the process that loads the library, so that it
// runs on the threads that PyTorch has.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace {

using index = std::ptrdiff_t;

// ---------------------------------------------------------------------------------------------- small matrix products

// Rows of a matrix, `stride` apart. With first == nullptr and stride 0 they are zero.
template <class real>
struct Rows {
    real* first;
    index stride;
    real* operator[](index r) const { return first + r * stride; }
    Rows from(index row, index column) const {
        return first ? Rows{first + row * stride + column, stride} : Rows{nullptr, 0};
    }
};

#if defined(__AVX512F__)
constexpr int register_bytes = 64, wide = 4;  // 4 x 4 sums in 32 registers
#elif defined(__AVX__)
constexpr int register_bytes = 32, wide = 2;
#else
constexpr int register_bytes = 16, wide = 2;
#endif

template <class real, int bytes>
struct Vector {
    typedef real type __attribute__((vector_size(bytes), aligned(alignof(real)), may_alias));
};

// out[r, 0:V*width] = start[r] + sum_k x[r, k] w[k] for R rows, in registers, where V vectors are `width` long each; rows of w
// are n long. An addition waits four cycles for the one before: with few rows and vectors, P partial sums take turns.
template <class real, int R, int V, int bytes>
inline void block(Rows<const real> x, index inner, const real* w, index n, Rows<const real> start, Rows<real> out) {
    using vector = typename Vector<real, bytes>::type;
    constexpr index width = bytes / sizeof(real);
    constexpr int P = R * V >= 4 ? 1 : 4;
    vector sum[P][R][V] = {};
    if (start.first)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[0][r][v] = *reinterpret_cast<const vector*>(start[r] + v * width);
    const auto add = [&](index k, int p) {
        vector row[V];
        for (int v = 0; v < V; v++) row[v] = *reinterpret_cast<const vector*>(w + k * n + v * width);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[p][r][v] += x[r][k] * row[v];
    };
    index k = 0;
    for (; k + P <= inner; k += P)
        for (int p = 0; p < P; p++) add(k + p, p);
    for (; k < inner; k++) add(k, 0);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            for (int p = 1; p < P; p++) sum[0][r][v] += sum[p][r][v];
            *reinterpret_cast<vector*>(out[r] + v * width) = sum[0][r][v];
        }
}

// V vectors of columns for any number of rows.
template <class real, int V, int bytes>
inline void columns(index rows, Rows<const real> x, index inner, const real* w, index n, Rows<const real> start,
                    Rows<real> out) {
    index r = 0;
    for (; r + 4 <= rows; r += 4)
        block<real, 4, V, bytes>(x.from(r, 0), inner, w, n, start.from(r, 0), out.from(r, 0));
    for (; r + 2 <= rows; r += 2)
        block<real, 2, V, bytes>(x.from(r, 0), inner, w, n, start.from(r, 0), out.from(r, 0));
    for (; r < rows; r++) block<real, 1, V, bytes>(x.from(r, 0), inner, w, n, start.from(r, 0), out.from(r, 0));
}

// The columns from j on in vectors of `bytes`, the last of which goes back over columns that are done already.
template <class real, int bytes>
inline void rest(index j, index rows, Rows<const real> x, index inner, const real* w, index n, Rows<const real> start,
                 Rows<real> out) {
    constexpr index width = bytes / sizeof(real);
    for (; j < n; j += width) {
        j = j + width > n ? n - width : j;
        columns<real, 1, bytes>(rows, x, inner, w + j, n, start.from(0, j), out.from(0, j));
    }
}

// out (rows, n) = start (rows, n) + x (rows, inner) w (inner, n). `start` must not overlap `out`: some columns may be
// computed twice.
template <class real>
inline void product(index rows, Rows<const real> x, index inner, const real* w, index n, Rows<const real> start,
                    Rows<real> out) {
    constexpr index width = register_bytes / sizeof(real);
    index j = 0;
    if (rows == 1)  // more columns at once, so that additions need not wait for each other
        for (; j + 8 * width <= n; j += 8 * width)
            block<real, 1, 8, register_bytes>(x, inner, w + j, n, start.from(0, j), out.from(0, j));
    for (; j + wide * width <= n; j += wide * width)
        columns<real, wide, register_bytes>(rows, x, inner, w + j, n, start.from(0, j), out.from(0, j));
    if (n >= width)
        rest<real, register_bytes>(j, rows, x, inner, w, n, start, out);
    else if (n >= index(16 / sizeof(real)))
        rest<real, 16>(j, rows, x, inner, w, n, start, out);
    else
        rest<real, sizeof(real)>(j, rows, x, inner, w, n, start, out);
}

// out += left right, elementwise.
template <class real>
inline void multiply_add(const real* left, const real* right, real* __restrict out, index size) {
    for (index i = 0; i < size; i++) out[i] += left[i] * right[i];
}

// ------------------------------------------------------------------------------------------------------ units of work

struct Shape {
    index groups, steps, batch, state, hidden, out;
    index shared;      // whether groups share their weights
    index transposed;  // bit i: operand i, a weight (inner, outer), lies in memory as (outer, inner)
};

// Sequences row..row+rows of a group; or, of that many groups from this one on, sequence `row`.
struct Unit {
    index group, row, rows;
    bool across_groups;
};

// What a unit sees of a sequence (G, steps, B, width); none if there is no such operand.
template <class real>
struct Sequence {
    real* data;
    index step, stride;
    Sequence(void* operand, const Shape& s, const Unit& u, index steps, index width)
        : data(operand ? static_cast<real*>(operand) + (u.group * steps * s.batch + u.row) * width : nullptr),
          step(s.batch * width),
          stride(u.across_groups ? steps * s.batch * width : width) {}
    Rows<real> operator[](index t) const { return data ? Rows<real>{data + t * step, stride} : Rows<real>{nullptr, 0}; }
};

// Aligned to cache lines: a vector that lies across two takes twice as long to load.
template <class real>
real* allocate(index size) {
    constexpr std::size_t line = 64;
    return static_cast<real*>(std::aligned_alloc(line, (size * sizeof(real) + line - 1) / line * line));
}

// A unit's weight (inner, outer), row by row; a transposed copy where memory has it column by column. `mirrored` asks for the
// transpose of what the operand is.
template <class real>
struct Weight {
    const real* data;
    real* scratch = nullptr;
    Weight(void* const* operands, int i, const Shape& s, const Unit& u, index inner, index outer, bool mirrored = false)
        : data(static_cast<const real*>(operands[i]) + (s.shared ? 0 : u.group * inner * outer)) {
        if ((s.transposed >> i & 1) == mirrored) return;
        scratch = allocate<real>(inner * outer);
        constexpr index tile = 16;
        for (index j0 = 0; j0 < outer; j0 += tile)
            for (index k0 = 0; k0 < inner; k0 += tile)
                for (index k = k0; k < inner && k < k0 + tile; k++)
                    for (index j = j0; j < outer && j < j0 + tile; j++) scratch[k * outer + j] = data[j * inner + k];
        data = scratch;
    }
    ~Weight() { std::free(scratch); }
    Weight(const Weight&) = delete;
};

template <class real>
Rows<const real> bias(void* operand, const Shape& s, const Unit& u, index size) {
    return {static_cast<const real*>(operand) + (s.shared ? 0 : u.group * size), 0};
}

template <class real>
void copy(Rows<const real> from, Rows<real> to, index rows, index width) {
    for (index r = 0; r < rows; r++)
        for (index i = 0; i < width; i++) to[r][i] = from[r][i];
}

// max(x, 0), where NaN stays NaN.
template <class real>
void rectify(Rows<real> x, index rows, index width) {
    for (index r = 0; r < rows; r++) {
        real* row = x[r];
        for (index i = 0; i < width; i++) row[i] = row[i] < 0 ? 0 : row[i];
    }
}

// x relu'(z), where NaN in z stays NaN.
template <class real>
void multiply_by_slope(Rows<real> x, Rows<const real> z, index rows, index width) {
    for (index r = 0; r < rows; r++) {
        real* row = x[r];
        const real* z_row = z[r];
        for (index i = 0; i < width; i++) row[i] = z_row[i] > 0 ? row[i] : z_row[i] * 0;
    }
}

template <class real>
Rows<const real> constant(Rows<real> x) {
    return {x.first, x.stride};
}

// Sets rows to zero where a mask says so, in a copy.
template <class real>
struct Masked {
    real* scratch;
    index rows, width;
    Masked(bool needed, index rows, index width)
        : scratch(needed ? allocate<real>(rows * width) : nullptr), rows(rows), width(width) {}
    ~Masked() { std::free(scratch); }
    Masked(const Masked&) = delete;
    inline Rows<const real> operator()(Rows<const real> x, Rows<const uint8_t> keep) const {
        if (!scratch) return x;
        for (index r = 0; r < rows; r++)
            for (index j = 0; j < width; j++) scratch[r * width + j] = *keep[r] ? x[r][j] : 0;
        return {scratch, width};
    }
};

// ------------------------------------------------------------------------------------------------ recurrences of scan.py

// c, w_in, b, w_out, keep? -> h, z: h_0 = c_0, z_t = relu((k_t h_{t-1}) W_in + b), h_t = z_t W_out + c_t.
template <class real>
inline void mlp(const Shape& s, const Unit& u, void* const* operands) {
    const Sequence<const real> c(operands[0], s, u, s.steps + 1, s.state);
    const Weight<real> w_in(operands, 1, s, u, s.state, s.hidden), w_out(operands, 3, s, u, s.hidden, s.state);
    const Rows<const real> b = bias<real>(operands[2], s, u, s.hidden);
    const Sequence<const uint8_t> keep(operands[4], s, u, s.steps, 1);
    const Sequence<real> h(operands[5], s, u, s.steps + 1, s.state), z(operands[6], s, u, s.steps, s.hidden);
    const Masked<real> masked(keep.data, u.rows, s.state);

    copy(c[0], h[0], u.rows, s.state);
    for (index t = 0; t < s.steps; t++) {
        product(u.rows, masked(constant(h[t]), keep[t]), s.state, w_in.data, s.hidden, b, z[t]);
        rectify(z[t], u.rows, s.hidden);
        product(u.rows, constant(z[t]), s.hidden, w_out.data, s.state, c[t + 1], h[t + 1]);
    }
}

// f, a?, z, w_in, w_out, keep? -> h, p: h_0 = f_0, p_t = ((k_t h_{t-1}) W_in + a_t) relu'(z_t), h_t = p_t W_out + f_t. Adjoint:
// h_T = f_T, p_t = (h_t W_out^T + a_t) relu'(z_t), h_{t-1} = k_t (p_t W_in^T) + f_{t-1}.
template <class real, bool adjoint>
inline void linear(const Shape& s, const Unit& u, void* const* operands) {
    const Sequence<const real> f(operands[0], s, u, s.steps + 1, s.state);
    const Sequence<const real> a(operands[1], s, u, s.steps, s.hidden), z(operands[2], s, u, s.steps, s.hidden);
    const Weight<real> w_1(operands, adjoint ? 4 : 3, s, u, s.state, s.hidden, adjoint);
    const Weight<real> w_2(operands, adjoint ? 3 : 4, s, u, s.hidden, s.state, adjoint);
    const Sequence<const uint8_t> keep(operands[5], s, u, s.steps, 1);
    const Sequence<real> h(operands[6], s, u, s.steps + 1, s.state), p(operands[7], s, u, s.steps, s.hidden);
    const Masked<real> masked(keep.data, u.rows, adjoint ? s.hidden : s.state);

    const index start = adjoint ? s.steps : 0;
    copy(f[start], h[start], u.rows, s.state);
    for (index i = 0; i < s.steps; i++) {
        const index t = adjoint ? s.steps - 1 - i : i, source = t + adjoint, target = t + !adjoint;
        const Rows<const real> x = constant(h[source]);
        product(u.rows, adjoint ? x : masked(x, keep[t]), s.state, w_1.data, s.hidden, a[t], p[t]);
        multiply_by_slope(p[t], z[t], u.rows, s.hidden);
        const Rows<const real> y = constant(p[t]);
        product(u.rows, adjoint ? masked(y, keep[t]) : y, s.hidden, w_2.data, s.state, f[target], h[target]);
    }
}
template <class real>
inline void linear_forward(const Shape& s, const Unit& u, void* const* operands) {
    linear<real, false>(s, u, operands);
}
template <class real>
inline void linear_adjoint(const Shape& s, const Unit& u, void* const* operands) {
    linear<real, true>(s, u, operands);
}

// ------------------------------------------------------------------------------------------------ maps of perceptron.py

// Calls map(first, rows) for pieces of a unit whose hidden activations fit into the first-level cache.
template <class Map>
void for_pieces(index rows, Map map) {
    constexpr index piece = 32;
    for (index r = 0; r < rows; r += piece) map(r, r + piece > rows ? rows - r : piece);
}

// x, f?, w_in, b, w_out -> y, z: z = relu(x W_in + b), y = z W_out + f, for all steps.
template <class real>
inline void perceptron(const Shape& s, const Unit& u, void* const* operands) {
    const Sequence<const real> x(operands[0], s, u, s.steps, s.state), f(operands[1], s, u, s.steps, s.out);
    const Weight<real> w_in(operands, 2, s, u, s.state, s.hidden), w_out(operands, 4, s, u, s.hidden, s.out);
    const Rows<const real> b = bias<real>(operands[3], s, u, s.hidden);
    const Sequence<real> y(operands[5], s, u, s.steps, s.out), z(operands[6], s, u, s.steps, s.hidden);
    for (index t = 0; t < s.steps; t++)
        for_pieces(u.rows, [&](index r, index rows) {
            const Rows<real> z_t = z[t].from(r, 0);
            product(rows, x[t].from(r, 0), s.state, w_in.data, s.hidden, b, z_t);
            rectify(z_t, rows, s.hidden);
            product(rows, constant(z_t), s.hidden, w_out.data, s.out, f[t].from(r, 0), y[t].from(r, 0));
        });
}

// x, a?, z, w_1, w_2 -> y, p: p = (x W_1 + a) relu'(z), y = p W_2, for all steps.
template <class real>
inline void linear_perceptron(const Shape& s, const Unit& u, void* const* operands) {
    const Sequence<const real> x(operands[0], s, u, s.steps, s.state);
    const Sequence<const real> a(operands[1], s, u, s.steps, s.hidden), z(operands[2], s, u, s.steps, s.hidden);
    const Weight<real> w_1(operands, 3, s, u, s.state, s.hidden), w_2(operands, 4, s, u, s.hidden, s.out);
    const Sequence<real> y(operands[5], s, u, s.steps, s.out), p(operands[6], s, u, s.steps, s.hidden);
    for (index t = 0; t < s.steps; t++)
        for_pieces(u.rows, [&](index r, index rows) {
            const Rows<real> p_t = p[t].from(r, 0);
            product(rows, x[t].from(r, 0), s.state, w_1.data, s.hidden, a[t].from(r, 0), p_t);
            multiply_by_slope(p_t, z[t].from(r, 0), rows, s.hidden);
            product(rows, constant(p_t), s.hidden, w_2.data, s.out, Rows<const real>{nullptr, 0}, y[t].from(r, 0));
        });
}

// ------------------------------------------------------------------------------------------ recurrences of gated_scan.py

// f, e?, a, d, w, keep? -> v, u: u_t = (k_t h_{t-1}) W + e_t, v_t = A_t k_t v_{t-1} + D_t u_t + f_t, where h is the first of the
// n blocks of v, and A_t (n x n) and D_t (n x m) are elementwise block coefficients.
template <class real>
inline void gated_forward(const Shape& s, const Unit& unit, void* const* operands) {
    const index S = s.state, n = s.out / S, m = s.hidden / S, rows = unit.rows;
    const Sequence<const real> f(operands[0], s, unit, s.steps + 1, n * S), e(operands[1], s, unit, s.steps, m * S);
    const Sequence<const real> a(operands[2], s, unit, s.steps, n * n * S), d(operands[3], s, unit, s.steps, n * m * S);
    const Weight<real> w(operands, 4, s, unit, S, m * S);
    const Sequence<const uint8_t> keep(operands[5], s, unit, s.steps, 1);
    const Sequence<real> v(operands[6], s, unit, s.steps + 1, n * S), u(operands[7], s, unit, s.steps, m * S);
    const Masked<real> masked(keep.data, rows, n * S);

    copy(f[0], v[0], rows, n * S);
    for (index t = 0; t < s.steps; t++) {
        const Rows<const real> source = masked(constant(v[t]), keep[t]);
        product(rows, source, S, w.data, m * S, e[t], u[t]);
        copy(f[t + 1], v[t + 1], rows, n * S);
        for (index r = 0; r < rows; r++)
            for (index i = 0; i < n; i++) {
                real* out = v[t + 1][r] + i * S;
                for (index j = 0; j < n; j++) multiply_add(a[t][r] + (i * n + j) * S, source[r] + j * S, out, S);
                for (index k = 0; k < m; k++) multiply_add(d[t][r] + (i * m + k) * S, u[t][r] + k * S, out, S);
            }
    }
}

// The adjoint: q_t = D_t^T v_t + e_t, v_{t-1} = k_t (A_t^T v_t + P q_t W^T) + f_{t-1}, where P puts a block in the place of h.
template <class real>
inline void gated_adjoint(const Shape& s, const Unit& unit, void* const* operands) {
    const index S = s.state, n = s.out / S, m = s.hidden / S, rows = unit.rows;
    const Sequence<const real> f(operands[0], s, unit, s.steps + 1, n * S), e(operands[1], s, unit, s.steps, m * S);
    const Sequence<const real> a(operands[2], s, unit, s.steps, n * n * S), d(operands[3], s, unit, s.steps, n * m * S);
    const Weight<real> w(operands, 4, s, unit, m * S, S, true);
    const Sequence<const uint8_t> keep(operands[5], s, unit, s.steps, 1);
    const Sequence<real> v(operands[6], s, unit, s.steps + 1, n * S), q(operands[7], s, unit, s.steps, m * S);
    const Masked<real> masked(keep.data, rows, m * S), others(true, rows, S);

    copy(f[s.steps], v[s.steps], rows, n * S);
    for (index t = s.steps - 1; t >= 0; t--) {
        const Rows<real> source = v[t + 1];
        copy(f[t], v[t], rows, n * S);
        for (index r = 0; r < rows; r++) {
            for (index k = 0; k < m; k++) {
                real* out = q[t][r] + k * S;
                for (index x = 0; x < S; x++) out[x] = e.data ? e[t][r][k * S + x] : 0;
                for (index i = 0; i < n; i++) multiply_add(d[t][r] + (i * m + k) * S, source[r] + i * S, out, S);
            }
            if (keep.data && !*keep[t][r]) continue;
            for (index i = 0; i < n; i++)
                for (index j = 0; j < n; j++)
                    multiply_add(a[t][r] + (i * n + j) * S, source[r] + i * S, v[t][r] + j * S, S);
        }
        for (index r = 0; r < rows; r++)
            for (index x = 0; x < S; x++) others.scratch[r * S + x] = v[t][r][x];
        product(rows, masked(constant(q[t]), keep[t]), m * S, w.data, S, Rows<const real>{others.scratch, S}, v[t]);
    }
}

// ------------------------------------------------------------------------------------------------------- gated cells

template <class real>
struct Exponential;
template <>
struct Exponential<float> {
    using bits = int32_t;
    static constexpr int mantissa = 23, bias = 127, terms = 7;
    static constexpr float largest = 87, to_integer = 12582912.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Exponential<double> {
    using bits = int64_t;
    static constexpr int mantissa = 52, bias = 1023, terms = 13;
    static constexpr double largest = 708, to_integer = 6755399441055744.0, ln2_high = 6.93145751953125e-1,
                            ln2_low = 1.42860682030941723212e-6;
};

// e^x - 1 for |x| <= `largest`, NaN for NaN; accurate near 0 too. With x = n ln 2 + r it is 2^n (e^r - 1) + (2^n - 1), where
// e^r - 1 is a Taylor polynomial. No branches, so that a loop over it is vectorised.
template <class real>
inline real expm1(real x) {
    using E = Exponential<real>;
    const real shifted = x * real(1.44269504088896340736) + E::to_integer, n = shifted - E::to_integer;
    const real r = (x - n * E::ln2_high) - n * E::ln2_low;
    real series = 1;
    for (int k = E::terms; k >= 2; k--) series = 1 + series * r * (real(1) / k);
    const auto exponent =
        __builtin_bit_cast(typename E::bits, shifted) - __builtin_bit_cast(typename E::bits, real(E::to_integer));
    const real power = __builtin_bit_cast(real, (exponent + E::bias) << E::mantissa);
    return power * (series * r) + (power - 1);
}
template <class real>
inline real clamp(real x, real limit) {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
}
template <class real>
inline real sigmoid(real x) {
    return 1 / (2 + expm1(clamp(-x, Exponential<real>::largest)));
}
template <class real>
inline real tanh(real x) {
    const real e = expm1(clamp(2 * x, real(40)));  // tanh(20) rounds to 1
    return e / (e + 2);
}

// The next state of a sequence: v (n S), u (m S), x (k S) -> out (n S).
struct GRU {
    static constexpr index n = 1, m = 3;
    template <class real>
    static void step(index S, const real* v, const real* u, const real* x, real* __restrict out) {
        for (index i = 0; i < S; i++) {
            const real r = sigmoid(u[i] + x[i]), z = sigmoid(u[S + i] + x[S + i]);
            const real candidate = tanh(x[2 * S + i] + r * u[2 * S + i]);
            out[i] = candidate + z * (v[i] - candidate);
        }
    }
};
struct LSTM {
    static constexpr index n = 2, m = 4;
    template <class real>
    static void step(index S, const real* v, const real* u, const real* x, real* __restrict out) {
        for (index i = 0; i < S; i++) {
            const real input = sigmoid(u[i] + x[i]), forget = sigmoid(u[S + i] + x[S + i]);
            const real c = forget * v[S + i] + input * tanh(u[2 * S + i] + x[2 * S + i]);
            out[S + i] = c;
            out[i] = sigmoid(u[3 * S + i] + x[3 * S + i]) * tanh(c);
        }
    }
};

// start, x, w, b, keep? -> v, u: v_0 = start, u_t = (k_t h_{t-1}) W + b, v_t = Cell(k_t v_{t-1}, u_t, x_t).
template <class Cell, class real>
inline void cell(const Shape& s, const Unit& unit, void* const* operands) {
    const index S = s.state, n = Cell::n * S, m = Cell::m * S;
    const Sequence<const real> start(operands[0], s, unit, 1, n), x(operands[1], s, unit, s.steps, m);
    const Weight<real> w(operands, 2, s, unit, S, m);
    const Rows<const real> b = bias<real>(operands[3], s, unit, m);
    const Sequence<const uint8_t> keep(operands[4], s, unit, s.steps, 1);
    const Sequence<real> v(operands[5], s, unit, s.steps + 1, n), u(operands[6], s, unit, s.steps, m);
    const Masked<real> masked(keep.data, unit.rows, n);

    copy(start[0], v[0], unit.rows, n);
    for (index t = 0; t < s.steps; t++) {
        const Rows<const real> source = masked(constant(v[t]), keep[t]);
        product(unit.rows, source, S, w.data, m, b, u[t]);
        for (index r = 0; r < unit.rows; r++) Cell::step(S, source[r], u[t][r], x[t][r], v[t + 1][r]);
    }
}
template <class real>
inline void gru(const Shape& s, const Unit& u, void* const* operands) {
    cell<GRU, real>(s, u, operands);
}
template <class real>
inline void lstm(const Shape& s, const Unit& u, void* const* operands) {
    cell<LSTM, real>(s, u, operands);
}

// -------------------------------------------------------------------------------------- recurrence of diagonal_scan.py

// a, f, keep? -> h: h_0 = f_0, h_t = a (k_t h_{t-1}) + f_t, where a (2, S) and the states (2 S) are complex numbers, first all
// real parts; in the sizes `state` is 2, `hidden` and `out` are 2 S. Adjoint: h_T = f_T, h_{t-1} = k_t (conj(a) h_t) + f_{t-1}.
template <class real, bool adjoint>
inline void diagonal(const Shape& s, const Unit& u, void* const* operands) {
    const index S = s.out / 2;
    const Weight<real> a(operands, 0, s, u, 2, S);
    const Sequence<const real> f(operands[1], s, u, s.steps + 1, 2 * S);
    const Sequence<const uint8_t> keep(operands[2], s, u, s.steps, 1);
    const Sequence<real> h(operands[3], s, u, s.steps + 1, 2 * S);
    const real *a_re = a.data, *a_im = a.data + S;

    const index start = adjoint ? s.steps : 0;
    copy(f[start], h[start], u.rows, 2 * S);
    for (index i = 0; i < s.steps; i++) {
        const index t = adjoint ? s.steps - 1 - i : i, source = t + adjoint, target = t + !adjoint;
        for (index r = 0; r < u.rows; r++) {
            const real *x = h[source][r], *add = f[target][r];
            real* __restrict out = h[target][r];
            if (keep.data && !*keep[t][r]) {
                for (index j = 0; j < 2 * S; j++) out[j] = add[j];
                continue;
            }
            for (index j = 0; j < S; j++) {
                const real im = adjoint ? -a_im[j] : a_im[j], x_re = x[j], x_im = x[S + j];
                out[j] = add[j] + a_re[j] * x_re - im * x_im;
                out[S + j] = add[S + j] + a_re[j] * x_im + im * x_re;
            }
        }
    }
}
template <class real>
inline void diagonal_forward(const Shape& s, const Unit& u, void* const* operands) {
    diagonal<real, false>(s, u, operands);
}
template <class real>
inline void diagonal_adjoint(const Shape& s, const Unit& u, void* const* operands) {
    diagonal<real, true>(s, u, operands);
}

// ------------------------------------------------------------------------------------------------------- entry points

// Runs a kernel for all units: rows in multiples of four, and about four units for every thread. Where groups share their
// weights and are small, a unit goes across them.
void run(void (*kernel)(const Shape&, const Unit&, void* const*), const Shape& s, int threads, void* const* operands) {
    if (s.groups * s.batch == 0) return;
    // Threads take longer to start than a small problem does.
    if (s.groups * s.batch * s.steps * s.state * s.hidden < 1 << 18) threads = 1;
    const bool across = s.shared && s.batch < 4 && s.groups > s.batch;
    const index length = across ? s.groups : s.batch, lines = across ? s.batch : s.groups;
    index rows = (s.groups * s.batch / (4 * threads) + 3) / 4 * 4;
    rows = rows < 4 ? 4 : rows;
    const index per_line = (length + rows - 1) / rows, units = lines * per_line;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && units > 1)
    for (index i = 0; i < units; i++) {
        const index line = i / per_line, first = i % per_line * rows, count = first + rows > length ? length - first : rows;
        kernel(s, across ? Unit{first, line, count, true} : Unit{line, first, count, false}, operands);
    }
}

}  // namespace

// void <name>_<real>(sizes[8], threads, operands): sizes are those of Shape, operands the addresses of arguments and results
// in the order of the kernel's comment, null where an optional one is missing.
#define KERNEL(name, real)                                                                                     \
    extern "C" __attribute__((visibility("default"))) void name##_##real(const index* z, int threads,            \
                                                                         void* const* operands) {                \
        run(name<real>, Shape{z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7]}, threads, operands);                      \
    }

KERNEL(mlp, float)
KERNEL(mlp, double)
KERNEL(linear_forward, float)
KERNEL(linear_forward, double)
KERNEL(linear_adjoint, float)
KERNEL(linear_adjoint, double)
KERNEL(perceptron, float)
KERNEL(perceptron, double)
KERNEL(linear_perceptron, float)
KERNEL(linear_perceptron, double)
KERNEL(gated_forward, float)
KERNEL(gated_forward, double)
KERNEL(gated_adjoint, float)
KERNEL(gated_adjoint, double)
KERNEL(gru, float)
KERNEL(gru, double)
KERNEL(lstm, float)
KERNEL(lstm, double)
KERNEL(diagonal_forward, float)
KERNEL(diagonal_forward, double)
KERNEL(diagonal_adjoint, float)
KERNEL(diagonal_adjoint, double)
