"""What guards one attempt at a run: the lock of its folder, the record of its end, and the watchdog."""
