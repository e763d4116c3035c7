# May import: standard library, scikit-learn and rouge-score (inside functions), refswitch.errors.
"""How good answers are: exact match, F1 and ROUGE-2, by the libraries that the field uses. Paper: table 5's metrics."""

from __future__ import annotations

from collections.abc import Sequence

from refswitch.errors import InputError

NEEDED = "fine-tuning measures answers with scikit-learn and rouge-score: pip install 'refswitch[tasks]'"


def check_scores() -> None:
    """Refuse before the work what could not be measured after it.

    Raises
    ------
    InputError
        Where a library is missing.
    """
    try:
        import rouge_score.rouge_scorer  # noqa: F401
        import sklearn.metrics  # noqa: F401 - both: are they there?
    except ImportError:
        raise InputError(NEEDED) from None


def scores_of(answers: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Return the scores of answers in [0, 1].

    `exact_match` is the share of answers that are the target, which for labels is the accuracy; `f1` is scikit-learn's over the labels, each label
    alike; `rouge2` is the mean F-measure of ROUGE-2 with stemming. White space at the ends does not count.
    """
    from rouge_score import rouge_scorer
    from sklearn.metrics import accuracy_score, f1_score

    given, wanted = [answer.strip() for answer in answers], [target.strip() for target in targets]
    scorer = rouge_scorer.RougeScorer(["rouge2"], use_stemmer=True)
    rouge = [scorer.score(target, answer)["rouge2"].fmeasure for target, answer in zip(wanted, given, strict=True)]
    return {
        "exact_match": float(accuracy_score(wanted, given)),
        "f1": float(f1_score(wanted, given, labels=sorted(set(wanted)), average="macro", zero_division=0.0)),
        "rouge2": sum(rouge) / len(rouge),
    }
