"""OPT: pre-norm blocks, positions added in the decoder's forward."""

from transformers import PretrainedConfig

from sft.models.families.family import Family


def _refuses(config: PretrainedConfig) -> str:
    if not config.do_layer_norm_before:
        return "its blocks end in a norm (do_layer_norm_before is false, as in opt-350m); choose another size"
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings are projected to the model's width; choose another size"
    if config.layerdrop > 0:
        return "layers are dropped in training, and the one that is cut cannot be; set layerdrop to 0 in config.json"
    return ""


OPT = Family(
    model_types=("opt",),
    blocks="decoder.layers",
    embeddings="decoder.embed_tokens",
    ffn_out="fc2",
    ffn_dropout="dropout",
    final_norm="decoder.final_layer_norm",
    added_to_embeddings=("decoder.embed_positions",),
    ffn_width="ffn_dim",
    decoder=True,
    refuses=_refuses,
)
