"""The ops in C++, for the CPU that this process runs on: one extension, compiled when it is first needed."""
