from kernel_paths import one_thread, path  # noqa: F401  fixtures
