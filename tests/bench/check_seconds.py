"""Processor seconds of the conformance checks of the embedded model and of policies on it, and whether remembered.

`OMP_NUM_THREADS=1 python tests/bench/check_seconds.py [--remember] POLICY...`
"""

import sys
import time

from kvbench.engine.survey import survey
from kvbench.models import load_model
from kvbench.plugins import registry
from kvbench.runs.proofs import checker

names = [name for name in sys.argv[1:] if name != "--remember"]
loaded, policies = load_model(), [registry().make("policy", name) for name in names]
survey(loaded.model)
conformance = checker(loaded, anew="--remember" not in sys.argv)
for name, check in [
    ("the model", conformance.check_model),
    *((policy.name, lambda policy=policy: conformance.check_policy(policy)) for policy in policies),
]:
    start = time.process_time()
    report = check()
    print(f"{name}: {time.process_time() - start:.2f} s, remembered: {report.remembered}, failure: {report.failure}")
