"""What every call passes before the service sees it: size, form, quotas, waits."""

from sft_cloud.admission.connections import ConnectionGuard, open_files_limit, room
from sft_cloud.admission.deadlines import Deadlines
from sft_cloud.admission.interceptor import AdmissionInterceptor
from sft_cloud.admission.pace import Pace
from sft_cloud.admission.quotas import Quotas
from sft_cloud.admission.reception import Reception, Strangers

__all__ = [
    "AdmissionInterceptor",
    "ConnectionGuard",
    "Deadlines",
    "Pace",
    "Quotas",
    "Reception",
    "Strangers",
    "open_files_limit",
    "room",
]
