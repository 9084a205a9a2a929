"""Its place puts ``tests/`` on the import path: test modules and spawned ranks share :mod:`helpers`."""
