"""Coverage-guided fuzzing (atheris): every input gives a value or a worded error, in 5 ms and 10 MB. Run ``make fuzz``."""
