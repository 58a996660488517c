"""What each half is started with."""

from __future__ import annotations

import torch

from sft.models import Cut, build_net_2, build_whole
from sft.optim.spec import make_optimizer, spec_from_proto
from sft_edge.model_files.source import Source
from sft_edge.options import OptimizerOptions
from sft_edge.systems.halves import halve, optimizer_spec

HEAD = "sequence-classification"


def test_the_factors_get_their_rate_in_either_half(source: Source) -> None:
    """As each half's own optimizer has it, the cloud's from what it is sent."""
    cut, options = Cut("sft", 2, 4), OptimizerOptions(learning_rate=1e-3, factor_learning_rate=1e-2)
    start = halve(source, HEAD, cut, optimizer_spec(options, build_whole(source.config, HEAD, cut)), 11)
    net_2 = build_net_2(source.config, HEAD, cut)
    on_edge = start.start_edge(torch.device("cpu")), start.net_1.whole_parameters()
    on_cloud = (
        make_optimizer(spec_from_proto(start.request.optimizer), net_2.whole_parameters()),
        net_2.whole_parameters(),
    )
    for (optimizer, parameters), factors in ((on_edge, ("ffn1",)), (on_cloud, ("ffn2", "ffn3"))):
        rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
        apart = {name for name, parameter in parameters.items() if rates.get(id(parameter)) == 1e-2}
        assert apart == {f"bert.encoder.layer.1.output.dense.{factor}.weight" for factor in factors}
        assert set(rates.values()) == {1e-3, 1e-2}
