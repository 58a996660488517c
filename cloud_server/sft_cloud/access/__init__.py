"""Who calls: tokens, certificates, and the interceptor that lets nobody else in."""

from sft_cloud.access.interceptor import OPEN_METHODS
from sft_cloud.access.protection import Access, make_access
from sft_cloud.access.tokens import LIMIT_NAMES, Token, TokenFile, check_name, largest_limit, make_limits

__all__ = [
    "LIMIT_NAMES",
    "OPEN_METHODS",
    "Access",
    "Token",
    "TokenFile",
    "authority",
    "check_name",
    "largest_limit",
    "make_access",
    "make_limits",
]
