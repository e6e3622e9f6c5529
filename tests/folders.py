"""What several tests ask of a folder."""


def contents(folder):
    """{path below it: bytes} of its files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
