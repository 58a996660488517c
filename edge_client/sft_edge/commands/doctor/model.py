"""What a cloud has of a model, asked as a run would ask, without a session."""

from __future__ import annotations

from typing import List, Optional, Tuple

from sft.errors import LinkError, ServerFullError, SFTError
from sft.models import Cut, build_whole
from sft.printable import format_bytes
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import Codecs, codecs_named, encoded_size
from sft_edge.commands.doctor.finding import Finding, failed, ok, skipped, warning
from sft_edge.commands.doctor.server import Way
from sft_edge.link import Transport, check_codecs
from sft_edge.model_files import Source, open_model
from sft_edge.options import DoctorOptions, OptimizerOptions
from sft_edge.systems import halve, mean_row_bytes, optimizer_spec

_LONG_SECONDS = 600.0
"""An upload that takes longer is worth a warning."""


def look_at_model(options: DoctorOptions, transport: Transport, way: Optional[Way]) -> List[Finding]:
    """Whether the cloud has our model, bit for bit, or what of it a first run would send."""
    if options.model is None and options.from_config is None:
        return [skipped("model", "not looked at: --model or --from-config is missing")]
    try:
        return [_look(options, transport, way)]
    except ServerFullError as error:
        return [failed("model", str(error), "see room and access above")]
    except LinkError as error:
        return [failed("model", str(error), "this model, or this cut, is not for this server, or not for us")]
    except SFTError as error:
        return [failed("model", str(error), "mend it here, before a run does not start")]


def _look(options: DoctorOptions, transport: Transport, way: Optional[Way]) -> Finding:
    source, cut = _source(options), _cut(options)
    whole = build_whole(source.config, options.head, cut)
    spec = optimizer_spec(OptimizerOptions(), whole)
    start = halve(source, options.head, cut, spec, options.seed, _codecs(options))
    request, blobs, weights_sha256 = start.request, start.blobs, start.request.weights_sha256
    request.only_check = True
    codec = request.activation_codec
    if _codecs(options).needs_tables:  # which a run has, once it has seen its rows
        request.activation_codec = pb.DATA_TYPE_UNSPECIFIED
    response = transport.open_session(request)
    request.activation_codec = codec
    check_codecs(response, request)
    unknown = [sha256 for sha256 in response.missing_blobs if sha256 not in blobs]
    if unknown:
        return failed("model", f"the server asks for {unknown[0][:16]}, which is not of this model", "see its log")
    if weights_sha256 not in response.missing_blobs:
        found = f"the server has the weights of {source.name}, bit for bit" if weights_sha256 else "drawn from the seed"
    else:
        found = "the server has not these weights"
    if weights_sha256:
        found += f" (SHA-256 {weights_sha256[:16]})"
    missing_bytes = sum(blobs[sha256].total_bytes for sha256 in response.missing_blobs)
    if not missing_bytes:
        return ok("model", found)
    return _upload(found, missing_bytes, way)


def step_bytes(options: DoctorOptions) -> Optional[Tuple[int, int]]:
    """Bytes of a full micro-batch's activation and gradient, none where the edge is not trained; None where the
    width is not known.
    """
    width = options.split_rank
    if options.mode != "sft":
        if options.model is None and options.from_config is None:
            return None
        width = int(_source(options).config.hidden_size)
    tokens = options.per_device_train_batch_size * options.max_seq_length
    codecs = _codecs(options)
    fitted, is_frozen = codecs.needs_tables, codecs.needs_tables or options.mode == "frozen"
    sent = int(tokens * mean_row_bytes(width)) if fitted else encoded_size((tokens, width), codecs.activation)
    return sent, 0 if is_frozen else encoded_size((tokens, width), codecs.gradient)


def _codecs(options: DoctorOptions) -> Codecs:
    return codecs_named(options.wire_dtype, options.codec, options.gradient_codec)


def _upload(found: str, missing_bytes: int, way: Optional[Way]) -> Finding:
    found += f"; a first run sends {format_bytes(missing_bytes)}"
    if way is None:
        return ok("model", found)
    seconds = missing_bytes / way.up_bytes_per_second
    found += f", which takes {seconds:.0f} s"
    if seconds <= _LONG_SECONDS:
        return ok("model", found)
    return warning("model", found, "put the same model into the server's --model-dir, and nothing but factors is sent")


def _cut(options: DoctorOptions) -> Cut:
    if options.mode == "sft":
        return Cut("sft", options.split_layer, options.split_rank)
    return Cut("sl", options.split_layer, 0)


def _source(options: DoctorOptions) -> Source:
    overrides = {"sequence-classification": {"num_labels": 2, "problem_type": "single_label_classification"}}
    overrides["question-answering"] = {"num_labels": 2}
    of_head = overrides.get(options.head, {})
    return open_model(options.model, options.from_config, of_head, options.model_name)
