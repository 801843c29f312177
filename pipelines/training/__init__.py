"""The parts of training; `pipelines/train.py` is the stage that puts them on a cluster.

loop.py  worker.py                            what every rank runs, and one rank
parallel.py                                   the group of ranks, and how a model is spread over it
checkpoints.py  checkpoint_folder.py          what is kept to go on from, and what that is in storage
preemption.py  telemetry.py                   machines that are taken away; what a person can see
"""
