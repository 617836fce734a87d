"""The top of the page: what it is about, the accuracy with its interval, the verdict in a line, and what speaks against
it."""

from vlm.evaluation.calibrating import missed_target
from vlm.report.page.content import WIDE, Content
from vlm.report.page.markup import Markup, class_name, element, join, percent, shorten


def title(content: Content) -> str:
    task = content.results.get("settings", {}).get("task_description") or "Image classification"
    return shorten(task[:1].upper() + task[1:], 120)


def subtitle(content: Content) -> Markup:
    settings, source = content.results.get("settings", {}), content.data.source.get("dataset")
    model = settings.get("model") or ("the demo's model" if settings.get("demo") else None)
    facts = [model, source, f"{len(content.names):,} classes", f"{len(content.predictions):,} test images"]
    return join([" · ".join(shorten(str(fact), 80) for fact in facts if fact)])


def headline(content: Content) -> Markup:
    """Accuracy with its interval, the verdict in a line, and what speaks against it."""
    value, low, high = content.accuracy
    number = element("p", element("strong", percent(value), class_="big"), " test accuracy", class_="accuracy")
    interval = element("p", f"95% interval {percent(low)} to {percent(high)}", class_="quiet")
    span = element("i", class_="span", style=f"left:{low:.2%};width:{max(high - low, 0):.2%}")
    point = element("i", class_="point", style=f"left:{value:.2%}")
    ruler = element(
        "div",
        span,
        point,
        class_="ruler",
        role="img",
        aria_label=f"Accuracy {percent(value)} on a scale from 0 to 100%",
    )
    warnings = [element("li", text) for text in concerns(content)]
    return element(
        "div",
        element("div", number, interval, ruler, class_="score"),
        element(
            "div",
            element("p", verdict(content), class_="verdict"),
            element("ul", *warnings, class_="warnings") if warnings else None,
        ),
        class_="headline",
    )


def verdict(content: Content) -> Markup:
    """One line: how many are right, what guessing gives, and the answer that a collapsed model gives or the most
    frequent mistake."""
    correct, total = int(content.counts.trace()), int(content.counts.sum())
    name, share = content.majority
    guess = [
        "Right on ",
        f"{correct:,} of {total:,} test images; always answering ",
        class_name(name),
        f" gives {percent(share)}. ",
    ]
    if correct == total:
        return join([*guess, "There is no mistake."])
    if content.favorite:
        answer, count = content.favorite
        return join([*guess, "The model answers ", class_name(answer), f" for {count:,} of {total:,} images."])
    truth, wrong, count, support = content.confusions[0]
    if count == 1:
        return join([*guess, "No mistake was made twice."])
    return join(
        [
            *guess,
            "Most frequent mistake: ",
            class_name(truth),
            " taken for ",
            class_name(wrong),
            f" ({count:,} of {support:,}).",
        ]
    )


def concerns(content: Content) -> list[str]:
    """Why the accuracy may mean less than it seems."""
    _, low, high = content.accuracy
    found = []
    if low <= content.majority[1]:
        found.append("The accuracy is not clearly above that of always answering the most frequent class.")
    if high - low > WIDE:
        found.append(
            f"{len(content.predictions):,} test images are few: the true accuracy may be anywhere in the interval."
        )
    abstention = content.test.get("abstention")
    if abstention and abstention["below"] is None:
        missed = missed_target(abstention["target_precision"])
        found.append(f"{missed[0].upper()}{missed[1:]}.")
    warnings = [(content.results.get(part) or {}).get("warning") for part in ("probe", "picture_check")]
    return found + [warning[0].upper() + warning[1:] for warning in warnings if warning]
