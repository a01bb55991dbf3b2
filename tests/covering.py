"""How often intervals hold the truth, over repeats of which some may state none."""

import math


class Covering:
    """Counts, by name, of intervals stated and of those that hold the truth."""

    def __init__(self, truths):
        self.truths = truths
        self.stated = dict.fromkeys(truths, 0)
        self.held = dict.fromkeys(truths, 0)
        self.runs = 0

    def add(self, *owners):
        """One repeat; the estimates are fields of `owners`, or entries where these are mappings."""
        self.runs += 1
        found = {}
        for owner in owners:
            found |= owner if isinstance(owner, dict) else vars(owner)
        for name, truth in self.truths.items():
            low, high = found[name].interval()
            self.stated[name] += not math.isnan(low)
            self.held[name] += low <= truth <= high

    def __str__(self):
        return ", ".join(f"{n}: {self.held[n]} of {self.stated[n]}" for n in self.truths)

    def assert_at_level(self, least=0.9):
        """Nine runs in ten or more state every interval of 95%, and of these 93–97% hold."""
        for name, held in self.held.items():
            stated = self.stated[name]
            assert stated >= least * self.runs, (name, str(self))
            assert 0.93 * stated <= held <= 0.97 * stated, (name, str(self))

    def assert_few_wrong(self, most=0.07):
        """Of all runs at most so many state an interval that does not hold, told or not."""
        for name, held in self.held.items():
            assert self.stated[name] - held <= most * self.runs, (name, str(self))
