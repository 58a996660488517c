from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_INT8: _ClassVar[DataType]
    DATA_TYPE_INT4: _ClassVar[DataType]
    DATA_TYPE_FITTED: _ClassVar[DataType]

class Head(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEAD_UNSPECIFIED: _ClassVar[Head]
    HEAD_SEQUENCE_CLASSIFICATION: _ClassVar[Head]
    HEAD_QUESTION_ANSWERING: _ClassVar[Head]
    HEAD_CAUSAL_LM: _ClassVar[Head]
    HEAD_TOKEN_CLASSIFICATION: _ClassVar[Head]
    HEAD_MULTIPLE_CHOICE: _ClassVar[Head]
    HEAD_MASKED_LM: _ClassVar[Head]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_SFT: _ClassVar[Mode]
    MODE_SL: _ClassVar[Mode]

class Residual(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDUAL_UNSPECIFIED: _ClassVar[Residual]
    RESIDUAL_NONE: _ClassVar[Residual]
    RESIDUAL_LOW_RANK: _ClassVar[Residual]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_INT8: DataType
DATA_TYPE_INT4: DataType
DATA_TYPE_FITTED: DataType
HEAD_UNSPECIFIED: Head
HEAD_SEQUENCE_CLASSIFICATION: Head
HEAD_QUESTION_ANSWERING: Head
HEAD_CAUSAL_LM: Head
HEAD_TOKEN_CLASSIFICATION: Head
HEAD_MULTIPLE_CHOICE: Head
HEAD_MASKED_LM: Head
MODE_UNSPECIFIED: Mode
MODE_SFT: Mode
MODE_SL: Mode
RESIDUAL_UNSPECIFIED: Residual
RESIDUAL_NONE: Residual
RESIDUAL_LOW_RANK: Residual

class Tensor(_message.Message):
    __slots__ = ("data_type", "shape", "data")
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    data_type: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, data_type: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Cut(_message.Message):
    __slots__ = ("mode", "split_layer", "split_rank", "residual", "layer_name")
    MODE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_LAYER_FIELD_NUMBER: _ClassVar[int]
    SPLIT_RANK_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    LAYER_NAME_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    split_layer: int
    split_rank: int
    residual: Residual
    layer_name: str
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., split_layer: _Optional[int] = ..., split_rank: _Optional[int] = ..., residual: _Optional[_Union[Residual, str]] = ..., layer_name: _Optional[str] = ...) -> None: ...

class OptimizerArgument(_message.Message):
    __slots__ = ("number", "integer", "flag", "text", "numbers", "mixed")
    class Numbers(_message.Message):
        __slots__ = ("values",)
        VALUES_FIELD_NUMBER: _ClassVar[int]
        values: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...
    class Mixed(_message.Message):
        __slots__ = ("values",)
        VALUES_FIELD_NUMBER: _ClassVar[int]
        values: _containers.RepeatedCompositeFieldContainer[OptimizerArgument]
        def __init__(self, values: _Optional[_Iterable[_Union[OptimizerArgument, _Mapping]]] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    MIXED_FIELD_NUMBER: _ClassVar[int]
    number: float
    integer: int
    flag: bool
    text: str
    numbers: OptimizerArgument.Numbers
    mixed: OptimizerArgument.Mixed
    def __init__(self, number: _Optional[float] = ..., integer: _Optional[int] = ..., flag: bool = ..., text: _Optional[str] = ..., numbers: _Optional[_Union[OptimizerArgument.Numbers, _Mapping]] = ..., mixed: _Optional[_Union[OptimizerArgument.Mixed, _Mapping]] = ...) -> None: ...

class ParameterGroup(_message.Message):
    __slots__ = ("parameter_names", "arguments")
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: OptimizerArgument
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[OptimizerArgument, _Mapping]] = ...) -> None: ...
    PARAMETER_NAMES_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    parameter_names: _containers.RepeatedScalarFieldContainer[str]
    arguments: _containers.MessageMap[str, OptimizerArgument]
    def __init__(self, parameter_names: _Optional[_Iterable[str]] = ..., arguments: _Optional[_Mapping[str, OptimizerArgument]] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("name", "groups")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    groups: _containers.RepeatedCompositeFieldContainer[ParameterGroup]
    def __init__(self, name: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[ParameterGroup, _Mapping]]] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("protocol_version", "package_version", "model_name", "config_json", "head", "cut", "seed", "weights_sha256", "factors_sha256", "optimizer", "wire_data_type", "lora_json", "request_id", "run_id", "resume_from", "only_check", "activation_codec", "gradient_codec", "codec_tables_sha256", "keep_key")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    FACTORS_SHA256_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    WIRE_DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    LORA_JSON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    ONLY_CHECK_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_CODEC_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_TABLES_SHA256_FIELD_NUMBER: _ClassVar[int]
    KEEP_KEY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    package_version: str
    model_name: str
    config_json: str
    head: Head
    cut: Cut
    seed: int
    weights_sha256: str
    factors_sha256: str
    optimizer: Optimizer
    wire_data_type: DataType
    lora_json: str
    request_id: str
    run_id: str
    resume_from: _containers.RepeatedCompositeFieldContainer[CheckpointId]
    only_check: bool
    activation_codec: DataType
    gradient_codec: DataType
    codec_tables_sha256: str
    keep_key: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., package_version: _Optional[str] = ..., model_name: _Optional[str] = ..., config_json: _Optional[str] = ..., head: _Optional[_Union[Head, str]] = ..., cut: _Optional[_Union[Cut, _Mapping]] = ..., seed: _Optional[int] = ..., weights_sha256: _Optional[str] = ..., factors_sha256: _Optional[str] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., wire_data_type: _Optional[_Union[DataType, str]] = ..., lora_json: _Optional[str] = ..., request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., resume_from: _Optional[_Iterable[_Union[CheckpointId, _Mapping]]] = ..., only_check: bool = ..., activation_codec: _Optional[_Union[DataType, str]] = ..., gradient_codec: _Optional[_Union[DataType, str]] = ..., codec_tables_sha256: _Optional[str] = ..., keep_key: _Optional[bytes] = ...) -> None: ...

class CheckpointId(_message.Message):
    __slots__ = ("step", "sha256")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    step: int
    sha256: str
    def __init__(self, step: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session_id", "missing_blobs", "package_version", "device", "next_step", "session_timeout_seconds", "codecs", "keeps_activations", "kept", "takes_detach", "takes_ahead", "takes_variants", "takes_mixed", "takes_modes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MISSING_BLOBS_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    SESSION_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    TAKES_DETACH_FIELD_NUMBER: _ClassVar[int]
    TAKES_AHEAD_FIELD_NUMBER: _ClassVar[int]
    TAKES_VARIANTS_FIELD_NUMBER: _ClassVar[int]
    TAKES_MIXED_FIELD_NUMBER: _ClassVar[int]
    TAKES_MODES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    missing_blobs: _containers.RepeatedScalarFieldContainer[str]
    package_version: str
    device: str
    next_step: int
    session_timeout_seconds: float
    codecs: _containers.RepeatedScalarFieldContainer[DataType]
    keeps_activations: bool
    kept: int
    takes_detach: bool
    takes_ahead: bool
    takes_variants: bool
    takes_mixed: bool
    takes_modes: bool
    def __init__(self, session_id: _Optional[str] = ..., missing_blobs: _Optional[_Iterable[str]] = ..., package_version: _Optional[str] = ..., device: _Optional[str] = ..., next_step: _Optional[int] = ..., session_timeout_seconds: _Optional[float] = ..., codecs: _Optional[_Iterable[_Union[DataType, str]]] = ..., keeps_activations: bool = ..., kept: _Optional[int] = ..., takes_detach: bool = ..., takes_ahead: bool = ..., takes_variants: bool = ..., takes_mixed: bool = ..., takes_modes: bool = ...) -> None: ...

class UploadBlobRequest(_message.Message):
    __slots__ = ("sha256", "total_bytes", "data")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    total_bytes: int
    data: bytes
    def __init__(self, sha256: _Optional[str] = ..., total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadBlobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownloadWeightsRequest(_message.Message):
    __slots__ = ("session_id", "optimizer_state", "offset")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STATE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    optimizer_state: bool
    offset: int
    def __init__(self, session_id: _Optional[str] = ..., optimizer_state: bool = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadWeightsResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Labels(_message.Message):
    __slots__ = ("classes", "values", "spans", "tokens")
    class Classes(_message.Message):
        __slots__ = ("ids",)
        IDS_FIELD_NUMBER: _ClassVar[int]
        ids: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...
    class Values(_message.Message):
        __slots__ = ("values", "columns")
        VALUES_FIELD_NUMBER: _ClassVar[int]
        COLUMNS_FIELD_NUMBER: _ClassVar[int]
        values: _containers.RepeatedScalarFieldContainer[float]
        columns: int
        def __init__(self, values: _Optional[_Iterable[float]] = ..., columns: _Optional[int] = ...) -> None: ...
    class Tokens(_message.Message):
        __slots__ = ("ids",)
        IDS_FIELD_NUMBER: _ClassVar[int]
        ids: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...
    class Spans(_message.Message):
        __slots__ = ("starts", "ends")
        STARTS_FIELD_NUMBER: _ClassVar[int]
        ENDS_FIELD_NUMBER: _ClassVar[int]
        starts: _containers.RepeatedScalarFieldContainer[int]
        ends: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, starts: _Optional[_Iterable[int]] = ..., ends: _Optional[_Iterable[int]] = ...) -> None: ...
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    classes: Labels.Classes
    values: Labels.Values
    spans: Labels.Spans
    tokens: Labels.Tokens
    def __init__(self, classes: _Optional[_Union[Labels.Classes, _Mapping]] = ..., values: _Optional[_Union[Labels.Values, _Mapping]] = ..., spans: _Optional[_Union[Labels.Spans, _Mapping]] = ..., tokens: _Optional[_Union[Labels.Tokens, _Mapping]] = ...) -> None: ...

class Activation(_message.Message):
    __slots__ = ("packed", "lengths", "padded_length", "keep", "kept", "variant", "other_mode")
    PACKED_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    PADDED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    OTHER_MODE_FIELD_NUMBER: _ClassVar[int]
    packed: Tensor
    lengths: _containers.RepeatedScalarFieldContainer[int]
    padded_length: int
    keep: _containers.RepeatedScalarFieldContainer[int]
    kept: _containers.RepeatedScalarFieldContainer[int]
    variant: int
    other_mode: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, packed: _Optional[_Union[Tensor, _Mapping]] = ..., lengths: _Optional[_Iterable[int]] = ..., padded_length: _Optional[int] = ..., keep: _Optional[_Iterable[int]] = ..., kept: _Optional[_Iterable[int]] = ..., variant: _Optional[int] = ..., other_mode: _Optional[_Iterable[str]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("activation", "labels", "loss_scale", "eval_mode", "want_logits", "frozen_edge", "autocast", "draws", "scored")
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    EVAL_MODE_FIELD_NUMBER: _ClassVar[int]
    WANT_LOGITS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_EDGE_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    activation: Activation
    labels: Labels
    loss_scale: float
    eval_mode: bool
    want_logits: bool
    frozen_edge: bool
    autocast: DataType
    draws: Draws
    scored: Labels
    def __init__(self, activation: _Optional[_Union[Activation, _Mapping]] = ..., labels: _Optional[_Union[Labels, _Mapping]] = ..., loss_scale: _Optional[float] = ..., eval_mode: bool = ..., want_logits: bool = ..., frozen_edge: bool = ..., autocast: _Optional[_Union[DataType, str]] = ..., draws: _Optional[_Union[Draws, _Mapping]] = ..., scored: _Optional[_Union[Labels, _Mapping]] = ...) -> None: ...

class Draws(_message.Message):
    __slots__ = ("seed", "step")
    SEED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    seed: int
    step: int
    def __init__(self, seed: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("gradient",)
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    gradient: Tensor
    def __init__(self, gradient: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Weight(_message.Message):
    __slots__ = ("micro_batch", "weight", "dropped")
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    micro_batch: int
    weight: float
    dropped: bool
    def __init__(self, micro_batch: _Optional[int] = ..., weight: _Optional[float] = ..., dropped: bool = ...) -> None: ...

class LoadState(_message.Message):
    __slots__ = ("sha256", "optimizer_state", "group_arguments")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STATE_FIELD_NUMBER: _ClassVar[int]
    GROUP_ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    optimizer_state: bool
    group_arguments: _containers.RepeatedCompositeFieldContainer[GroupArguments]
    def __init__(self, sha256: _Optional[str] = ..., optimizer_state: bool = ..., group_arguments: _Optional[_Iterable[_Union[GroupArguments, _Mapping]]] = ...) -> None: ...

class SaveCheckpoint(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KeepCheckpoints(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, steps: _Optional[_Iterable[int]] = ...) -> None: ...

class Detach(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, messages: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("activation", "autocast", "labels", "scored")
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    activation: Activation
    autocast: DataType
    labels: Labels
    scored: Labels
    def __init__(self, activation: _Optional[_Union[Activation, _Mapping]] = ..., autocast: _Optional[_Union[DataType, str]] = ..., labels: _Optional[_Union[Labels, _Mapping]] = ..., scored: _Optional[_Union[Labels, _Mapping]] = ...) -> None: ...

class GroupArguments(_message.Message):
    __slots__ = ("arguments",)
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: OptimizerArgument
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[OptimizerArgument, _Mapping]] = ...) -> None: ...
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    arguments: _containers.MessageMap[str, OptimizerArgument]
    def __init__(self, arguments: _Optional[_Mapping[str, OptimizerArgument]] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("step", "learning_rates", "clip_scale", "group_arguments", "keep_gradients", "max_grad_norm")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATES_FIELD_NUMBER: _ClassVar[int]
    CLIP_SCALE_FIELD_NUMBER: _ClassVar[int]
    GROUP_ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    step: int
    learning_rates: _containers.RepeatedScalarFieldContainer[float]
    clip_scale: float
    group_arguments: _containers.RepeatedCompositeFieldContainer[GroupArguments]
    keep_gradients: bool
    max_grad_norm: float
    def __init__(self, step: _Optional[int] = ..., learning_rates: _Optional[_Iterable[float]] = ..., clip_scale: _Optional[float] = ..., group_arguments: _Optional[_Iterable[_Union[GroupArguments, _Mapping]]] = ..., keep_gradients: bool = ..., max_grad_norm: _Optional[float] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("data", "total_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    total_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class EdgeMessage(_message.Message):
    __slots__ = ("step", "micro_batch", "weights", "commit", "gradient_scale", "averaged", "attach", "forward", "backward", "evaluate", "load_state", "save_checkpoint", "keep_checkpoints", "detach", "close", "probe", "number", "answered", "trace_parent", "part", "ahead")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_SCALE_FIELD_NUMBER: _ClassVar[int]
    AVERAGED_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    SAVE_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    KEEP_CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    TRACE_PARENT_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro_batch: int
    weights: _containers.RepeatedCompositeFieldContainer[Weight]
    commit: Commit
    gradient_scale: float
    averaged: bool
    attach: Attach
    forward: Forward
    backward: Backward
    evaluate: Evaluate
    load_state: LoadState
    save_checkpoint: SaveCheckpoint
    keep_checkpoints: KeepCheckpoints
    detach: Detach
    close: Close
    probe: ProbeRequest
    number: int
    answered: int
    trace_parent: str
    part: Part
    ahead: bool
    def __init__(self, step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., weights: _Optional[_Iterable[_Union[Weight, _Mapping]]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., gradient_scale: _Optional[float] = ..., averaged: bool = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., load_state: _Optional[_Union[LoadState, _Mapping]] = ..., save_checkpoint: _Optional[_Union[SaveCheckpoint, _Mapping]] = ..., keep_checkpoints: _Optional[_Union[KeepCheckpoints, _Mapping]] = ..., detach: _Optional[_Union[Detach, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., probe: _Optional[_Union[ProbeRequest, _Mapping]] = ..., number: _Optional[int] = ..., answered: _Optional[int] = ..., trace_parent: _Optional[str] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., ahead: bool = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("next_step", "last_number")
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_NUMBER_FIELD_NUMBER: _ClassVar[int]
    next_step: int
    last_number: int
    def __init__(self, next_step: _Optional[int] = ..., last_number: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("loss", "packed_gradient", "squared_gradient_norm", "logits", "own_squared_norm", "gradient_product", "no_gradient")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    PACKED_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SQUARED_GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    OWN_SQUARED_NORM_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_PRODUCT_FIELD_NUMBER: _ClassVar[int]
    NO_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    loss: float
    packed_gradient: Tensor
    squared_gradient_norm: float
    logits: Tensor
    own_squared_norm: float
    gradient_product: float
    no_gradient: bool
    def __init__(self, loss: _Optional[float] = ..., packed_gradient: _Optional[_Union[Tensor, _Mapping]] = ..., squared_gradient_norm: _Optional[float] = ..., logits: _Optional[_Union[Tensor, _Mapping]] = ..., own_squared_norm: _Optional[float] = ..., gradient_product: _Optional[float] = ..., no_gradient: bool = ...) -> None: ...

class Outputs(_message.Message):
    __slots__ = ("logits",)
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    logits: Tensor
    def __init__(self, logits: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("logits", "loss", "best_tokens")
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    BEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    logits: Tensor
    loss: float
    best_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, logits: _Optional[_Union[Tensor, _Mapping]] = ..., loss: _Optional[float] = ..., best_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Detached(_message.Message):
    __slots__ = ("error", "detached_timeout_seconds")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DETACHED_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    error: str
    detached_timeout_seconds: float
    def __init__(self, error: _Optional[str] = ..., detached_timeout_seconds: _Optional[float] = ...) -> None: ...

class CheckpointSaved(_message.Message):
    __slots__ = ("id", "total_bytes", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: CheckpointId
    total_bytes: int
    error: str
    def __init__(self, id: _Optional[_Union[CheckpointId, _Mapping]] = ..., total_bytes: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class StepSkipped(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("next_step", "squared_gradient_norm")
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    SQUARED_GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    next_step: int
    squared_gradient_norm: float
    def __init__(self, next_step: _Optional[int] = ..., squared_gradient_norm: _Optional[float] = ...) -> None: ...

class CloudMessage(_message.Message):
    __slots__ = ("step", "micro_batch", "cloud_seconds", "attached", "result", "evaluation", "committed", "outputs", "checkpoint_saved", "step_skipped", "probed", "detached", "number", "stopping", "keeps_only")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    CLOUD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_SAVED_FIELD_NUMBER: _ClassVar[int]
    STEP_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    DETACHED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    KEEPS_ONLY_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro_batch: int
    cloud_seconds: float
    attached: Attached
    result: Result
    evaluation: Evaluation
    committed: Committed
    outputs: Outputs
    checkpoint_saved: CheckpointSaved
    step_skipped: StepSkipped
    probed: ProbeResponse
    detached: Detached
    number: int
    stopping: bool
    keeps_only: int
    def __init__(self, step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., cloud_seconds: _Optional[float] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., outputs: _Optional[_Union[Outputs, _Mapping]] = ..., checkpoint_saved: _Optional[_Union[CheckpointSaved, _Mapping]] = ..., step_skipped: _Optional[_Union[StepSkipped, _Mapping]] = ..., probed: _Optional[_Union[ProbeResponse, _Mapping]] = ..., detached: _Optional[_Union[Detached, _Mapping]] = ..., number: _Optional[int] = ..., stopping: bool = ..., keeps_only: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionStatus(_message.Message):
    __slots__ = ("label", "owner", "model_name", "next_step", "age_seconds", "idle_seconds", "bytes_received", "bytes_sent", "attached", "split_rank", "detached")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    SPLIT_RANK_FIELD_NUMBER: _ClassVar[int]
    DETACHED_FIELD_NUMBER: _ClassVar[int]
    label: str
    owner: str
    model_name: str
    next_step: int
    age_seconds: float
    idle_seconds: float
    bytes_received: int
    bytes_sent: int
    attached: bool
    split_rank: int
    detached: bool
    def __init__(self, label: _Optional[str] = ..., owner: _Optional[str] = ..., model_name: _Optional[str] = ..., next_step: _Optional[int] = ..., age_seconds: _Optional[float] = ..., idle_seconds: _Optional[float] = ..., bytes_received: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., attached: bool = ..., split_rank: _Optional[int] = ..., detached: bool = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("package_version", "protocol_version", "device", "unix_seconds", "uptime_seconds", "caller", "sessions", "max_sessions", "open_sessions", "session_timeout_seconds", "token_expires_unix_seconds", "stopping", "limits", "missing_features")
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    OPEN_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    SESSION_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_EXPIRES_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FEATURES_FIELD_NUMBER: _ClassVar[int]
    package_version: str
    protocol_version: int
    device: str
    unix_seconds: float
    uptime_seconds: float
    caller: str
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    max_sessions: int
    open_sessions: int
    session_timeout_seconds: float
    token_expires_unix_seconds: float
    stopping: bool
    limits: CallerLimits
    missing_features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, package_version: _Optional[str] = ..., protocol_version: _Optional[int] = ..., device: _Optional[str] = ..., unix_seconds: _Optional[float] = ..., uptime_seconds: _Optional[float] = ..., caller: _Optional[str] = ..., sessions: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ..., max_sessions: _Optional[int] = ..., open_sessions: _Optional[int] = ..., session_timeout_seconds: _Optional[float] = ..., token_expires_unix_seconds: _Optional[float] = ..., stopping: bool = ..., limits: _Optional[_Union[CallerLimits, _Mapping]] = ..., missing_features: _Optional[_Iterable[str]] = ...) -> None: ...

class CallerLimits(_message.Message):
    __slots__ = ("max_sessions", "max_split_rank", "models", "steps_per_second", "max_bytes_per_day", "max_upload_bytes", "max_memory")
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SPLIT_RANK_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MEMORY_FIELD_NUMBER: _ClassVar[int]
    max_sessions: int
    max_split_rank: int
    models: _containers.RepeatedScalarFieldContainer[str]
    steps_per_second: float
    max_bytes_per_day: int
    max_upload_bytes: int
    max_memory: int
    def __init__(self, max_sessions: _Optional[int] = ..., max_split_rank: _Optional[int] = ..., models: _Optional[_Iterable[str]] = ..., steps_per_second: _Optional[float] = ..., max_bytes_per_day: _Optional[int] = ..., max_upload_bytes: _Optional[int] = ..., max_memory: _Optional[int] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("data", "reply_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    reply_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., reply_bytes: _Optional[int] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("data", "unix_seconds", "cloud_seconds")
    DATA_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CLOUD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    unix_seconds: float
    cloud_seconds: float
    def __init__(self, data: _Optional[bytes] = ..., unix_seconds: _Optional[float] = ..., cloud_seconds: _Optional[float] = ...) -> None: ...
