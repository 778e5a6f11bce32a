"""Serving engines as they are: the exports of a published pair loaded, and their acceptance and speed measured.

One module an engine (`in_vllm`, `in_transformers`, `in_llama_cpp`), each with `refuses(layout)` and `run(job, place)`;
`ours` does the same job in our own decoder, `compare` sets them side by side. Nothing here serves anybody.
"""
