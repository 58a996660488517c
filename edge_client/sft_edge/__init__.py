"""The edge: net_1, the data, the training loop and the command line of the side that is in charge."""

import os

# The workers that read data are forked while the link's threads run. They never call gRPC, and what it would do in each
# of them to be ready for that can wait for ever, for a lock that a thread held which is not there any more.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
