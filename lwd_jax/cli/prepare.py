"""Makes a dataset of a folder of pictures and their captions.

The folder is searched with its subfolders. The caption of photo.jpg is read from photo.txt (each line an alternative),
photo.json ({"caption": text or list}, also "captions", "text", "prompt") or a metadata.jsonl ({"file_name", "text"}).
EXIF orientation, colour profiles, transparency and 16-bit grey are brought to upright sRGB; a JPEG or PNG that is so
already keeps its bytes. Pictures that cannot be read, bombs and duplicates are left out and listed.
"""

import shlex
from collections import Counter

from etils.epath import Path
from rich.console import Console
from rich.table import Table

from lwd_jax.cli.progress import progress
from lwd_jax.data import buckets
from lwd_jax.data.captions import SOURCES, find_captions
from lwd_jax.data.dataset import INDEX, REPORT, Summary, find_pictures, write_dataset
from lwd_jax.errors import UserError
from lwd_jax.files import on_disk
from lwd_jax.report.staging import check_free

EXAMPLE = "lwd prepare --images photographs --out data/photographs --resolution 1024"
SHOWN = 20  # rejects that are printed; all are in the report file


def arguments(parser) -> None:
    parser.add_argument("--images", required=True, help="folder of pictures and captions")
    parser.add_argument("--out", required=True, help="dataset folder to write: new, or empty")
    parser.add_argument("--resolution", type=int, default=1024, help="px, for the printed table of aspect buckets")
    parser.add_argument("--captions-from", choices=SOURCES, default="auto", help="where captions are looked for")
    parser.add_argument(
        "--no-captions", action="store_true", help="go on if no picture has a caption (stage 1 needs none)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier dataset in --out")


def _bucket_table(summary: Summary, resolution: int) -> Table:
    bucket_of, sizes = buckets.assign(summary.heights, summary.widths, resolution, keep_aspect=True)
    counts = Counter(bucket_of.tolist())
    enlarged = Counter(
        bucket
        for bucket, height, width in zip(bucket_of.tolist(), summary.heights, summary.widths)
        if buckets.magnification(height, width, sizes[bucket]) > 1
    )
    table = Table(title=f"Aspect buckets at {resolution} px")
    for heading in ("width x height", "aspect", "pictures", "enlarged"):
        table.add_column(heading, justify="right")
    for bucket, (height, width) in enumerate(sizes):
        if counts[bucket]:
            table.add_row(f"{width} x {height}", f"{width / height:.2f}", str(counts[bucket]), str(enlarged[bucket]))
    return table


def _reject_table(rejects: list[tuple[str, str]]) -> Table:
    table = Table(title=f"Left out: {len(rejects)}")
    table.add_column("picture", overflow="fold")
    table.add_column("reason", overflow="fold")
    for name, reason in rejects[:SHOWN]:
        table.add_row(name, reason)
    return table


def run(args) -> None:
    buckets.check_resolution(args.resolution, keep_aspect=True)
    check_free(on_disk(args.out, "A dataset"), args.overwrite, INDEX, [args.images])
    paths = find_pictures(args.images)
    captions = find_captions(Path(args.images), paths, args.captions_from)
    if not any(captions) and not args.no_captions:
        raise UserError(
            f"None of the {len(paths)} pictures in '{args.images}' has a caption (.txt, .json or metadata.jsonl); "
            "stage 1 alone needs none: add --no-captions."
        )
    with progress() as show:
        summary = write_dataset(
            args.out, args.images, paths, captions, lambda done, total: show("pictures", done, total)
        )
    console = Console()
    console.print(_bucket_table(summary, args.resolution))
    if summary.rejects:
        console.print(_reject_table(summary.rejects))
    if summary.rejects[SHOWN:]:
        print(f"The other {len(summary.rejects) - SHOWN} are in {args.out}/{REPORT}.")
    if summary.uncaptioned:
        first = ", ".join(summary.uncaptioned[:3])
        print(f"{len(summary.uncaptioned)} pictures have no caption and train as unconditional, such as {first}.")
    if summary.reencoded:
        print(f"{summary.reencoded} pictures were brought to upright 8-bit sRGB and are kept as PNG.")
    print(
        f"{len(summary.heights)} of {len(paths)} pictures are in {args.out}. Next: train stage 1 on them, or "
        f"lwd encode --dataset {shlex.quote(args.out)} --models FOLDER --out LATENTS"
    )
