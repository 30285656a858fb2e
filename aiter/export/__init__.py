"""How does the op get into a checkout, or an installed tree, of ROCm's aiter?

`python -m aiter export --into FOLDER` writes it there, in that project's layout, style and build:

    layout      which tree is this, and what may be written where                  layout.py
    sources     our C++ sources as that project has them                           sources.py
    payload     every new file and every edit of a file that is there              payload.py
    formatting  black and clang-format, with that project's settings               formatting.py
    edits       lines that are put into its files, and taken out again             edits.py
    note        what was written, with hashes                                      note.py
    tree        write, remove, check, compare                                      tree.py

What is exported is made from the sources that this project is built from; the templates have only
what that project does in another way: a binding over its tensors, its `compile_ops`, an op test.
"""
