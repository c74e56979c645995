"""Records: the schema of the JSON files in the folders of runs, comparisons and studies, and of audit logs.

The server writes those of a run (`server.journal`), `copra_fl.reporting` the others. All readers parse the files with
these classes. A field that was not measured is None or empty, never absent.
"""

from copra_fl.records.audit import AuditedNode, AuditEvent, NodeRecord, read_records
from copra_fl.records.comparison import (
    MIN_SEEDS,
    ComparedSettings,
    ComparisonSummary,
    ConfigValue,
    Curve,
    EarlyEnd,
    Estimate,
    MetricEstimates,
    TargetCost,
    UnfinishedRun,
    Verdict,
)
from copra_fl.records.record import DamagedRecord, Record, RecordError
from copra_fl.records.run import (
    AggregationError,
    ClientEvaluation,
    ClientRecord,
    Evaluation,
    LinePath,
    MergeGap,
    MissingClient,
    Origin,
    Passes,
    PrivacyCharge,
    PrivacySpent,
    Provenance,
    RoundRecord,
    RunSummary,
    Tier,
    read_lines,
)
from copra_fl.records.study import (
    CellResults,
    ChosenRate,
    RankedMethod,
    RateRegret,
    StudyResults,
)

__all__ = [
    "MIN_SEEDS",
    "AggregationError",
    "AuditEvent",
    "AuditedNode",
    "CellResults",
    "ChosenRate",
    "ClientEvaluation",
    "ClientRecord",
    "ComparedSettings",
    "ComparisonSummary",
    "ConfigValue",
    "Curve",
    "DamagedRecord",
    "EarlyEnd",
    "Estimate",
    "Evaluation",
    "LinePath",
    "MergeGap",
    "MetricEstimates",
    "MissingClient",
    "NodeRecord",
    "Origin",
    "Passes",
    "PrivacyCharge",
    "PrivacySpent",
    "Provenance",
    "RankedMethod",
    "RateRegret",
    "Record",
    "RecordError",
    "RoundRecord",
    "RunSummary",
    "StudyResults",
    "TargetCost",
    "Tier",
    "UnfinishedRun",
    "Verdict",
    "read_lines",
    "read_records",
]
