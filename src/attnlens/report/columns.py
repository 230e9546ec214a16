"""The columns of the joined table, declared once: the Parquet schema, the page's table and its glossary read them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "integer", "number", "flag"]
# A row of the table, and of the files it is joined from: str, int, float, bool or None by column name.
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: `label` heads it on the page, `core` ones are shown there at first, `help` defines it."""

    name: str
    kind: Kind
    group: str
    label: str
    help: str
    core: bool = False


@dataclass(frozen=True)
class Measure:
    """A quantity of results/approximate/*.json: `field` there, and how its layers and heads become one number."""

    name: str
    field: str
    reduce: Literal["mean", "min", "max"]
    label: str
    help: str
    core: bool = False


SOURCES = {"own": "own Q, K, V", "reference": "reference model's Q, K, V"}

MEASURES = (
    Measure("error", "error", "mean", "error", "relative Frobenius error of the output against float64 softmax", True),
    Measure("error_min", "error", "min", "error, min", "smallest error over layers and heads"),
    Measure("error_max", "error", "max", "error, max", "largest error over layers and heads"),
    Measure(
        "skill", "skill", "mean", "skill", "error divided by the error of mean(V); 1 or more: no information", True
    ),
    Measure(
        "error_target", "error_target", "mean", "target error", "error against what the method itself approximates"
    ),
    Measure("error_mean_v", "error_mean_v", "mean", "mean(V) error", "error of answering with the mean of the values"),
    Measure("row_sum_defect", "row_sum_defect", "max", "row-sum defect", "largest |row sum of P~ - 1|"),
    Measure("negative_mass", "negative_mass", "mean", "negative mass", "mean mass of negative entries in a row of P~"),
    Measure("total_variation", "total_variation", "mean", "TV", "mean row-wise total variation between P~ and P"),
    Measure("kl", "kl", "mean", "KL", "mean row-wise Kullback-Leibler divergence, where rows are nonnegative"),
    Measure("max_row_error", "max_row_error", "max", "row error, max", "largest error of an output row"),
    Measure("operator_norm_error", "operator_norm_error", "mean", "‖·‖₂ error", "error in operator norm / (‖P‖ ‖V‖)"),
    Measure("sink_removed_error", "sink_removed_error", "mean", "error, no sink", "error without the sink column"),
    Measure("visited", "visited", "mean", "visited", "share of the visible entries that P~ does not leave at zero"),
    Measure(
        "rank_r_error", "rank_r_error", "mean", "best rank r", "output error of the best rank-r P at equal FLOPs", True
    ),
    Measure("top_k_error", "top_k_error", "mean", "exact top k", "output error of exact top-k at equal FLOPs", True),
    Measure(
        "top_k_remainder_error",
        "top_k_remainder_error",
        "mean",
        "top k + rest",
        "top-k, its dropped mass spread evenly",
    ),
    Measure(
        "optimality_low_rank", "optimality_low_rank", "mean", "optimality, rank", "‖P - P_r‖ / ‖P - P~‖ (Frobenius)"
    ),
    Measure("optimality_top_k", "optimality_top_k", "mean", "optimality, top k", "TV of exact top-k / TV of P~"),
    Measure("error_std", "error_std", "mean", "draw std", "standard deviation of the error over random draws"),
)


def _measured() -> Iterator[Column]:
    for source, group in SOURCES.items():
        for measure in MEASURES:
            yield Column(f"{source}_{measure.name}", "number", group, measure.label, measure.help, measure.core)


COLUMNS = (
    Column("method", "text", "cell", "method", "the operator: its module, yaml and cell have this name", True),
    Column("family", "text", "cell", "family", "family of the survey, declared on the class", True),
    Column("target", "text", "cell", "target", "what the method approximates; `itself`: its own definition"),
    Column("task", "text", "cell", "task", "the data set trained and tested on", True),
    Column("budget", "number", "cell", "budget", "share of exact attention's FLOPs aimed at; –: nothing to tune", True),
    Column("seed", "integer", "cell", "seed", "seed of the model (weights, batches, draws)", True),
    Column("status", "text", "cell", "status", "ok, unreachable (budget missed by over 10 %), not applicable", True),
    Column("metric", "text", "test score", "metric", "what `score` counts"),
    Column("higher_is_better", "flag", "test score", "higher is better", "the direction of the metric"),
    Column("score", "number", "test score", "score", "the metric of this seed's model on the test set", True),
    Column("score_mean", "number", "test score", "mean", "the metric over all seeds"),
    Column("score_low", "number", "test score", "low", "lower end of its confidence interval"),
    Column("score_high", "number", "test score", "high", "upper end of its confidence interval"),
    Column("difference", "number", "test score", "difference", "mean difference to the reference method, paired"),
    Column("difference_low", "number", "test score", "difference, low", "lower end of its confidence interval"),
    Column("difference_high", "number", "test score", "difference, high", "upper end of its confidence interval"),
    Column("p_value", "number", "test score", "p", "of the paired test, adjusted for the number of methods"),
    Column("verdict", "text", "test score", "verdict", "the method against the reference method"),
    Column("trained_argument", "text", "as trained", "argument", "the constructor argument used in training"),
    Column(
        "trained_achieved", "number", "as trained", "share of FLOPs", "its counted FLOPs / those of exact attention"
    ),
    Column("trained_error", "number", "as trained", "error", "output error in its own model, as trained there", True),
    Column("trained_skill", "number", "as trained", "skill", "that error divided by the error of mean(V)", True),
    *_measured(),
    Column("argument", "text", "cost", "argument", "the constructor argument that meets the budget", True),
    Column("achieved", "number", "cost", "achieved", "counted FLOPs / FLOPs of exact attention, same mask", True),
    Column("reachable", "flag", "cost", "reachable", "whether `achieved` is within 10 % of `budget`"),
    Column("flops", "number", "cost", "FLOPs", "counted FLOPs of one forward of a layer at batch 1, all heads", True),
    Column("exact_flops", "number", "cost", "exact FLOPs", "the same for exact attention"),
    Column("rank", "number", "cost", "r", "rank of the low-rank oracle at equal FLOPs"),
    Column("k", "number", "cost", "k", "keys a row of the top-k oracle at equal FLOPs"),
    Column("draws", "number", "cost", "draws", "random draws averaged over"),
    Column("reason", "text", "note", "note", "why a value is missing", True),
)
