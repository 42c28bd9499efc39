"""``python -m tests.mutations``: mutated inputs over all readers and a table of what came of them; 1 for a bad one."""

import argparse
import sys

from tests.mutations.harness import bad, run, table
from tests.mutations.readers import READERS

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--count", type=int, default=10_000, help="inputs in all")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--readers", default="", help="names of readers, with commas; default all")
parser.add_argument("--number", type=int, help="one trial of each of these readers, told whatever comes of it")
parser.add_argument("--most", type=int, default=12, help="findings of a reader that are told")
given = parser.parse_args()
chosen = [reader for reader in READERS if not given.readers or reader.name in given.readers.split(",")]
results = run(chosen, given.count, given.seed, number=given.number, most=given.most)
print("\n".join(bad(results)))
print(table(results))
sys.exit(bool(bad(results)) and given.number is None)
