"""trl's `SFTTrainer`, for language models, across edge and cloud.

    sft-cloud serve --port 50051
    python examples/sft_trainer.py --model_name_or_path MODEL --data_file TEXTS.jsonl --server localhost:50051 \
        --split_layer 12 --output_dir out

Needs `pip install trl`. Every option of `SFTConfig` is one here. The texts go to the cloud as labels, as ids of tokens.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from sft import SFTOptimizer


@dataclass
class Arguments:
    """What `SFTConfig` has not."""

    model_name_or_path: str
    data_file: str = field(metadata={"help": 'JSON lines with a "text" each'})
    server: str = field(metadata={"help": "HOST:PORT of a running `sft-cloud serve`"})
    split_layer: int
    split_rank: int = 8


def main() -> None:
    """Trains and saves."""
    arguments, training = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, trust_remote_code=False)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=load_dataset("json", data_files=arguments.data_file, split="train"),
        processing_class=AutoTokenizer.from_pretrained(arguments.model_name_or_path, trust_remote_code=False),
    )
    trainer.create_optimizer()
    trainer.optimizer = optimizer = SFTOptimizer(
        trainer.optimizer,
        role="edge",
        model=trainer.model,
        server=arguments.server,
        split_layer=arguments.split_layer,
        split_rank=arguments.split_rank,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    optimizer.close()


if __name__ == "__main__":
    main()
