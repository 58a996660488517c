"""Cutting any module that torch.fx can trace."""
