"""What the operator sees: figures, spans, the log, the audit log."""

from sft_cloud.observability.audit import AuditLog
from sft_cloud.observability.call_record import CallRecord
from sft_cloud.observability.interceptor import observing
from sft_cloud.observability.log_limit import LogLimit
from sft_cloud.observability.logs import set_up_logging
from sft_cloud.observability.model_name import model_name
from sft_cloud.observability.observer import NOBODY, Observer, Watch, open_observer

__all__ = [
    "NOBODY",
    "AuditLog",
    "CallRecord",
    "LogLimit",
    "Observer",
    "Watch",
    "model_name",
    "observing",
    "open_observer",
    "set_up_logging",
]
