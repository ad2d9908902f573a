from __future__ import annotations

import numpy as np

from ssmrl.env_runner.tasks.canvas import BLUE, GREY, RED, Canvas


def colored(canvas: Canvas, color: tuple[int, int, int]) -> np.ndarray:
    return np.asarray((canvas.pixels == color).all(axis=-1))


def test_a_canvas_is_white_and_has_the_rectangles_shape():
    canvas = Canvas((-1.0, 0.0), (1.0, 3.0), width=40)
    assert canvas.pixels.shape == (60, 40, 3)
    assert canvas.pixels.dtype == np.uint8
    assert (canvas.pixels == 255).all()


def test_a_disc_is_where_it_should_be_y_upwards():
    canvas = Canvas((0.0, 0.0), (10.0, 10.0), width=100)
    canvas.disc((2.0, 7.0), 1.0, RED)
    rows, columns = np.nonzero(colored(canvas, RED))
    assert (rows.mean(), columns.mean()) == (29.5, 19.5)
    assert abs(len(rows) - 100 * np.pi) < 12


def test_a_line_has_its_length_and_width():
    canvas = Canvas((0.0, 0.0), (10.0, 10.0), width=100)
    canvas.line((1.0, 5.0), (9.0, 5.0), 0.4, BLUE)
    rows, columns = np.nonzero(colored(canvas, BLUE))
    assert (rows.min(), rows.max()) == (48, 51)
    assert (columns.min(), columns.max()) == (8, 91)
    canvas.line((5.0, 5.0), (5.0, 5.0), 2.0, GREY)  # of no length: a disc
    assert abs(colored(canvas, GREY).sum() - 100 * np.pi) < 12


def test_bars_go_up_and_down_from_zero():
    canvas = Canvas((0.0, -2.0), (2.0, 2.0), width=20)
    canvas.bars([1.0, -2.0], [RED, BLUE])
    rows, columns = np.nonzero(colored(canvas, RED))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 19, 1, 8)
    rows, columns = np.nonzero(colored(canvas, BLUE))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 11, 18)
