"""`sft-edge plan`: what each way to train would take here, by measuring a little of it, and which is best."""
