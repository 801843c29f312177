"""The parts of bulk segmentation; `pipelines/segment.py` is the stage that puts them together.

listing.py  plan.py                         what is there, and what of it is to do
job.py  steps.py  model_step.py  tally.py   the pass over it on Ray Data, and what comes back
shards.py  shard_*.py  threaded.py          images that come in Parquet or tar
commits.py  attempts.py  rivals.py          rows at least once, and which of them counts
compaction.py  result_parts.py              rows into results/
summary.py  page.py  survey.py  pictures.py report.json and report.html
"""
