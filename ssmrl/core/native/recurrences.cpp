// The loops of ssmrl.core.scan, gated_scan and perceptron on the CPU, in float and double.
//
// Letters: G groups with weights of their own, T steps, B sequences, S state, H hidden, O outputs; n state blocks, m product
// blocks.
// Arrays are contiguous: sequences (G, T, B, width), weights (G, inner, outer), a mask (G, T, B).
//
// A unit of work is some sequences of one group through all T steps, so that weights and states stay in cache and threads
// never wait for each other between steps. The functions of OpenMP come from the process that loads the library, so that it
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

template <class real>
struct Vector {
    typedef real type __attribute__((vector_size(64), aligned(alignof(real)), may_alias));
    static constexpr index width = 64 / sizeof(real);
};

// out[r, 0:V*width] = start[r] + sum_k x[r, k] w[k] for R rows, in registers; rows of w are n long.
template <class real, int R, int V>
inline void block(Rows<const real> x, index inner, const real* w, index n, Rows<const real> start, Rows<real> out) {
    using vector = typename Vector<real>::type;
    constexpr index width = Vector<real>::width;
    vector sum[R][V] = {};
    if (start.first)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] = *reinterpret_cast<const vector*>(start[r] + v * width);
    for (index k = 0; k < inner; k++) {
        vector row[V];
        for (int v = 0; v < V; v++) row[v] = *reinterpret_cast<const vector*>(w + k * n + v * width);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] += x[r][k] * row[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) *reinterpret_cast<vector*>(out[r] + v * width) = sum[r][v];
}

// V vectors of columns for any number of rows.
template <class real, int V>
inline void columns(index rows, Rows<const real> x, index inner, const real* w, index n, Rows<const real> start,
                    Rows<real> out) {
    index r = 0;
    for (; r + 4 <= rows; r += 4) block<real, 4, V>(x.from(r, 0), inner, w, n, start.from(r, 0), out.from(r, 0));
    for (; r + 2 <= rows; r += 2) block<real, 2, V>(x.from(r, 0), inner, w, n, start.from(r, 0), out.from(r, 0));
    for (; r < rows; r++) block<real, 1, V>(x.from(r, 0), inner, w, n, start.from(r, 0), out.from(r, 0));
}

// out (rows, n) = start (rows, n) + x (rows, inner) w (inner, n). `start` must not overlap `out`: the last columns may be
// computed twice.
template <class real>
inline void product(index rows, Rows<const real> x, index inner, const real* w, index n, Rows<const real> start,
                    Rows<real> out) {
    constexpr index width = Vector<real>::width;
    if (n < width) {
        for (index r = 0; r < rows; r++) {
            real sum[width] = {};
            for (index j = 0; j < n; j++) sum[j] = start.first ? start[r][j] : 0;
            for (index k = 0; k < inner; k++)
                for (index j = 0; j < n; j++) sum[j] += x[r][k] * w[k * n + j];
            for (index j = 0; j < n; j++) out[r][j] = sum[j];
        }
        return;
    }
    index j = 0;
    if (rows == 1)  // more columns at once, so that additions need not wait for each other
        for (; j + 8 * width <= n; j += 8 * width)
            block<real, 1, 8>(x, inner, w + j, n, start.from(0, j), out.from(0, j));
    for (; j + 2 * width <= n; j += 2 * width)
        columns<real, 2>(rows, x, inner, w + j, n, start.from(0, j), out.from(0, j));
    for (; j < n; j += width) {
        j = j + width > n ? n - width : j;
        columns<real, 1>(rows, x, inner, w + j, n, start.from(0, j), out.from(0, j));
    }
}

// out += left right, elementwise.
template <class real>
inline void multiply_add(const real* left, const real* right, real* __restrict out, index size) {
    for (index i = 0; i < size; i++) out[i] += left[i] * right[i];
}

// ------------------------------------------------------------------------------------------------------ units of work

struct Shape {
    index groups, steps, batch, state, hidden, out;
};

// Sequences row..row+rows of a group.
struct Unit {
    index group, row, rows;
};

// What a unit sees of a sequence (G, steps, B, width); none if there is no such operand.
template <class real>
struct Sequence {
    real* data;
    index step, width;
    Sequence(void* operand, const Shape& s, const Unit& u, index steps, index width)
        : data(operand ? static_cast<real*>(operand) + (u.group * steps * s.batch + u.row) * width : nullptr),
          step(s.batch * width),
          width(width) {}
    Rows<real> operator[](index t) const { return data ? Rows<real>{data + t * step, width} : Rows<real>{nullptr, 0}; }
};

template <class real>
const real* of_group(void* operand, const Unit& u, index size) {
    return static_cast<const real*>(operand) + u.group * size;
}

template <class real>
void copy(Rows<const real> from, Rows<real> to, index rows) {
    for (index i = 0; i < rows * to.stride; i++) to.first[i] = from.first[i];
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
        : scratch(needed ? static_cast<real*>(std::malloc(rows * width * sizeof(real))) : nullptr), rows(rows), width(width) {}
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
    const real* w_in = of_group<real>(operands[1], u, s.state * s.hidden);
    const Rows<const real> b{of_group<real>(operands[2], u, s.hidden), 0};
    const real* w_out = of_group<real>(operands[3], u, s.state * s.hidden);
    const Sequence<const uint8_t> keep(operands[4], s, u, s.steps, 1);
    const Sequence<real> h(operands[5], s, u, s.steps + 1, s.state), z(operands[6], s, u, s.steps, s.hidden);
    const Masked<real> masked(keep.data, u.rows, s.state);

    copy(c[0], h[0], u.rows);
    for (index t = 0; t < s.steps; t++) {
        product(u.rows, masked(constant(h[t]), keep[t]), s.state, w_in, s.hidden, b, z[t]);
        real* z_t = z[t].first;
        for (index i = 0; i < u.rows * s.hidden; i++) z_t[i] = z_t[i] < 0 ? 0 : z_t[i];  // NaN stays NaN
        product(u.rows, constant(z[t]), s.hidden, w_out, s.state, c[t + 1], h[t + 1]);
    }
}

// f, a?, z, w_1, w_2, keep? -> h, p: h_0 = f_0, p_t = ((k_t h_{t-1}) W_1 + a_t) relu'(z_t), h_t = p_t W_2 + f_t. Adjoint, for
// transposed weights: h_T = f_T, p_t = (h_t W_1 + a_t) relu'(z_t), h_{t-1} = k_t (p_t W_2) + f_{t-1}.
template <class real, bool adjoint>
inline void linear(const Shape& s, const Unit& u, void* const* operands) {
    const Sequence<const real> f(operands[0], s, u, s.steps + 1, s.state);
    const Sequence<const real> a(operands[1], s, u, s.steps, s.hidden), z(operands[2], s, u, s.steps, s.hidden);
    const real* w_1 = of_group<real>(operands[3], u, s.state * s.hidden);
    const real* w_2 = of_group<real>(operands[4], u, s.state * s.hidden);
    const Sequence<const uint8_t> keep(operands[5], s, u, s.steps, 1);
    const Sequence<real> h(operands[6], s, u, s.steps + 1, s.state), p(operands[7], s, u, s.steps, s.hidden);
    const Masked<real> masked(keep.data, u.rows, adjoint ? s.hidden : s.state);

    const index start = adjoint ? s.steps : 0;
    copy(f[start], h[start], u.rows);
    for (index i = 0; i < s.steps; i++) {
        const index t = adjoint ? s.steps - 1 - i : i, source = t + adjoint, target = t + !adjoint;
        const Rows<const real> x = constant(h[source]);
        product(u.rows, adjoint ? x : masked(x, keep[t]), s.state, w_1, s.hidden, a[t], p[t]);
        real* p_t = p[t].first;
        const real* z_t = z[t].first;
        for (index j = 0; j < u.rows * s.hidden; j++) p_t[j] = z_t[j] > 0 ? p_t[j] : z_t[j] * 0;  // NaN stays NaN
        const Rows<const real> y = constant(p[t]);
        product(u.rows, adjoint ? masked(y, keep[t]) : y, s.hidden, w_2, s.state, f[target], h[target]);
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
    const real* w_in = of_group<real>(operands[2], u, s.state * s.hidden);
    const Rows<const real> b{of_group<real>(operands[3], u, s.hidden), 0};
    const real* w_out = of_group<real>(operands[4], u, s.hidden * s.out);
    const Sequence<real> y(operands[5], s, u, s.steps, s.out), z(operands[6], s, u, s.steps, s.hidden);
    for (index t = 0; t < s.steps; t++)
        for_pieces(u.rows, [&](index r, index rows) {
            const Rows<real> z_t = z[t].from(r, 0);
            product(rows, x[t].from(r, 0), s.state, w_in, s.hidden, b, z_t);
            for (index i = 0; i < rows * s.hidden; i++) z_t.first[i] = z_t.first[i] < 0 ? 0 : z_t.first[i];
            product(rows, constant(z_t), s.hidden, w_out, s.out, f[t].from(r, 0), y[t].from(r, 0));
        });
}

// x, a?, z, w_1, w_2 -> y, p: p = (x W_1 + a) relu'(z), y = p W_2, for all steps.
template <class real>
inline void linear_perceptron(const Shape& s, const Unit& u, void* const* operands) {
    const Sequence<const real> x(operands[0], s, u, s.steps, s.state);
    const Sequence<const real> a(operands[1], s, u, s.steps, s.hidden), z(operands[2], s, u, s.steps, s.hidden);
    const real* w_1 = of_group<real>(operands[3], u, s.state * s.hidden);
    const real* w_2 = of_group<real>(operands[4], u, s.hidden * s.out);
    const Sequence<real> y(operands[5], s, u, s.steps, s.out), p(operands[6], s, u, s.steps, s.hidden);
    for (index t = 0; t < s.steps; t++)
        for_pieces(u.rows, [&](index r, index rows) {
            const Rows<real> p_t = p[t].from(r, 0);
            product(rows, x[t].from(r, 0), s.state, w_1, s.hidden, a[t].from(r, 0), p_t);
            const real* z_t = z[t].from(r, 0).first;
            for (index i = 0; i < rows * s.hidden; i++)
                p_t.first[i] = z_t[i] > 0 ? p_t.first[i] : z_t[i] * 0;  // NaN stays NaN
            product(rows, constant(p_t), s.hidden, w_2, s.out, Rows<const real>{nullptr, 0}, y[t].from(r, 0));
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
    const real* w = of_group<real>(operands[4], unit, S * m * S);
    const Sequence<const uint8_t> keep(operands[5], s, unit, s.steps, 1);
    const Sequence<real> v(operands[6], s, unit, s.steps + 1, n * S), u(operands[7], s, unit, s.steps, m * S);
    const Masked<real> masked(keep.data, rows, n * S);

    copy(f[0], v[0], rows);
    for (index t = 0; t < s.steps; t++) {
        const Rows<const real> source = masked(constant(v[t]), keep[t]);
        product(rows, source, S, w, m * S, e[t], u[t]);
        copy(f[t + 1], v[t + 1], rows);
        for (index r = 0; r < rows; r++)
            for (index i = 0; i < n; i++) {
                real* out = v[t + 1][r] + i * S;
                for (index j = 0; j < n; j++) multiply_add(a[t][r] + (i * n + j) * S, source[r] + j * S, out, S);
                for (index k = 0; k < m; k++) multiply_add(d[t][r] + (i * m + k) * S, u[t][r] + k * S, out, S);
            }
    }
}

// The adjoint, for the transposed weight: q_t = D_t^T v_t + e_t, v_{t-1} = k_t (A_t^T v_t + P q_t W) + f_{t-1}, where P puts
// a block in the place of h.
template <class real>
inline void gated_adjoint(const Shape& s, const Unit& unit, void* const* operands) {
    const index S = s.state, n = s.out / S, m = s.hidden / S, rows = unit.rows;
    const Sequence<const real> f(operands[0], s, unit, s.steps + 1, n * S), e(operands[1], s, unit, s.steps, m * S);
    const Sequence<const real> a(operands[2], s, unit, s.steps, n * n * S), d(operands[3], s, unit, s.steps, n * m * S);
    const real* w = of_group<real>(operands[4], unit, S * m * S);
    const Sequence<const uint8_t> keep(operands[5], s, unit, s.steps, 1);
    const Sequence<real> v(operands[6], s, unit, s.steps + 1, n * S), q(operands[7], s, unit, s.steps, m * S);
    const Masked<real> masked(keep.data, rows, m * S), rest(true, rows, S);

    copy(f[s.steps], v[s.steps], rows);
    for (index t = s.steps - 1; t >= 0; t--) {
        const Rows<real> source = v[t + 1];
        copy(f[t], v[t], rows);
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
            for (index x = 0; x < S; x++) rest.scratch[r * S + x] = v[t][r][x];
        product(rows, masked(constant(q[t]), keep[t]), m * S, w, S, Rows<const real>{rest.scratch, S}, v[t]);
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
    const real* w = of_group<real>(operands[2], unit, S * m);
    const Rows<const real> b{of_group<real>(operands[3], unit, m), 0};
    const Sequence<const uint8_t> keep(operands[4], s, unit, s.steps, 1);
    const Sequence<real> v(operands[5], s, unit, s.steps + 1, n), u(operands[6], s, unit, s.steps, m);
    const Masked<real> masked(keep.data, unit.rows, n);

    copy(start[0], v[0], unit.rows);
    for (index t = 0; t < s.steps; t++) {
        const Rows<const real> source = masked(constant(v[t]), keep[t]);
        product(unit.rows, source, S, w, m, b, u[t]);
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

// ------------------------------------------------------------------------------------------------------- entry points

// Runs a kernel for all units: rows of a group in multiples of four, and about four units for every thread.
void run(void (*kernel)(const Shape&, const Unit&, void* const*), const Shape& s, int threads, void* const* operands) {
    if (s.groups * s.batch == 0) return;
    index rows = (s.groups * s.batch / (4 * threads) + 3) / 4 * 4;
    rows = rows < 4 ? 4 : rows;
    const index per_group = (s.batch + rows - 1) / rows, units = s.groups * per_group;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && units > 1)
    for (index i = 0; i < units; i++) {
        const index row = i % per_group * rows;
        kernel(s, Unit{i / per_group, row, row + rows > s.batch ? s.batch - row : rows}, operands);
    }
}

}  // namespace

// void <name>_<real>(sizes[6], threads, operands): sizes are those of Shape, operands the addresses of arguments and results
// in the order of the kernel's comment, null where an optional one is missing.
#define KERNEL(name, real)                                                                                     \
    extern "C" __attribute__((visibility("default"))) void name##_##real(const index* z, int threads,            \
                                                                         void* const* operands) {                \
        run(name<real>, Shape{z[0], z[1], z[2], z[3], z[4], z[5]}, threads, operands);                      \
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
