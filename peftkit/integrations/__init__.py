"""Adapters in other libraries' training loops: checkpoints of what is trained, without the base.

May import all of peftkit but `bench` and `cli`; nothing but `cli` may import it. Import each module by its path, where
its library is installed. Public: `transformers.AdapterCheckpoints` and `transformers.AdapterTrainer`,
`lightning.AdapterCheckpoints`, `accelerate.adapter_checkpoints`, `trl.ReferenceModel`,
`trl.AdapterDPOTrainer`, `trl.AdapterGRPOTrainer`, and `kohya`, a network module of sd-scripts.
"""
