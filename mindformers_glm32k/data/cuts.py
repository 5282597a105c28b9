"""Counting what had to be cut, in all worker threads and processes, and saying so."""
import multiprocessing

_FIELDS = ("rows", "prompts", "answers", "longest", "longest_sample")


class CutCounter:
    """Counts cut prompts and answers; warns at the first cut and sums up after every epoch's worth of rows.

    The counts lie in shared memory: worker processes that are forked from this one count together.

    Args:
        place (Callable[[int], str]): file and line of a sample's number.
        max_source_length (int), max_target_length (int): the limits, in tokens.
        rows_per_epoch (int): rows after which to sum up and start again.
        log: has warning(format, …).
    """

    def __init__(self, place, max_source_length, max_target_length, rows_per_epoch, log):
        self._place, self._log = place, log
        self._source, self._target, self._rows_per_epoch = max_source_length, max_target_length, rows_per_epoch
        self._counts = multiprocessing.Array("q", len(_FIELDS))  # with its lock
        self._warned = multiprocessing.Value("b", 0)

    def add(self, sample, prompt_tokens, answer_tokens):
        """Counts one row.

        Args:
            sample (int): its number.
            prompt_tokens (int), answer_tokens (int): lengths before the cut.
        """
        source_cut, target_cut = prompt_tokens > self._source, answer_tokens > self._target
        with self._counts.get_lock():
            counts = dict(zip(_FIELDS, self._counts))
            counts["rows"] += 1
            counts["prompts"] += source_cut
            counts["answers"] += target_cut
            if source_cut and prompt_tokens > counts["longest"]:
                counts.update(longest=prompt_tokens, longest_sample=sample)
            first = (source_cut or target_cut) and not self._warned.value
            self._warned.value = self._warned.value or first
            epoch_ends = counts["rows"] >= self._rows_per_epoch
            self._counts[:] = [0] * len(_FIELDS) if epoch_ends else [counts[name] for name in _FIELDS]
        if first:
            self._log.warning("%s: cut to fit the row (prompt %d of %d tokens, answer %d of %d); a summary follows "
                              "after each epoch", self._place(sample), min(prompt_tokens, self._source), prompt_tokens,
                              min(answer_tokens, self._target), answer_tokens)
        if epoch_ends and (counts["prompts"] or counts["answers"]):
            self._log.warning("%s", self.summary(counts))

    def summary(self, counts):
        """str: one sentence on an epoch's counts."""
        text = (f"of {counts['rows']} rows {counts['prompts']} had their prompt cut to max_source_length="
                f"{self._source} tokens and {counts['answers']} their answer to max_target_length={self._target}")
        if counts["prompts"]:
            text += f"; the longest prompt has {counts['longest']} tokens: {self._place(counts['longest_sample'])}"
        return text
