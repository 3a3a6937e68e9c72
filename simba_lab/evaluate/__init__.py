"""Quality: likelihood over windows, paired statistics, the evaluation harness."""
