"""The page's markup escapes what it is given; axes have few round ticks, and lines few points."""

import numpy as np
import pytest

from vlm.report.page.charts import MOST_POINTS, Axis, Line, axis_around, line_chart
from vlm.report.page.markup import Markup, class_name, element


def test_only_markup_is_not_escaped():
    assert element("p", "<", Markup("<br>"), None, 3, class_='"') == '<p class="&quot;">&lt;<br>3</p>'
    assert element("p", element("b", "&") + "<") == "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;&lt;</p>", (
        "sums are plain text again"
    )
    assert 'title="' + "x" * 50 in class_name("x" * 50) and "title" not in class_name("x")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 237), (0.93, 0.94), (3, 50_000), (0, 1e-9)])
def test_ticks_are_few_round_and_within(low, high):
    ticks = Axis("", low, high).ticks()
    assert 2 <= len(ticks) <= 7 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:.6g}".strip("0.")) <= 6 for tick in ticks)


def test_ticks_of_steps_are_whole_and_of_logarithms_decades():
    assert Axis("", 0, 2, whole=True).ticks() == [0, 1, 2]
    assert Axis("", 0.02, 60, log=True).ticks() == pytest.approx([0.03, 0.1, 0.3, 1, 3, 10, 30])
    assert len(Axis("", 1e-9, 1e9, log=True).ticks()) >= 2


def test_a_line_of_many_points_is_thinned_and_ends_where_it_ended():
    x, y = np.arange(9_999.0), np.linspace(1, 2, 9_999)
    chart = line_chart(
        [Line("a", x, y, "first"), Line("empty", [], [], "second")], Axis("x", 0, 9_998), axis_around("y", y), "Title"
    )
    path = chart.split('class="line')[0].rsplit('d="', 1)[1]
    assert path.count("L") <= MOST_POINTS + 1 and path.split("L")[-1].startswith("426")
    assert "empty" not in chart
    few, many = (
        line_chart([Line("a", x[:n], y[:n], "first", dots=True)], Axis("x", 0, n), axis_around("y", y), "T")
        for n in (3, 300)
    )
    assert (few.count("<circle"), many.count("<circle")) == (3, 0)
