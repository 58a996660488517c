"""What every call passes before the service sees it: size, form, quotas, waits."""
