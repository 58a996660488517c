"""Takes `torch.distributed` away, as NVIDIA builds torch for Jetson without it. Python runs this when it starts."""

import sys


class _WithoutDistributed:
    """Finds no module. It is asked for each, and so meets `torch.distributed` when torch's C part is loaded already."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            # By these torch tells what it was built with.
            for built_in in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"):
                delattr(sys.modules["torch._C"], built_in)


sys.meta_path.insert(0, _WithoutDistributed())
