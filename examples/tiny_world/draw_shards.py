"""Draw scenes and write them as img2dataset would: tars of jpg/txt/json, a parquet of metadata, and statistics.

    python -m examples.tiny_world.draw_shards --out outputs/demo/shards

Complete shards are kept, so the command can be run again.
"""

import argparse
import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image
from tqdm import trange

from examples.tiny_world.scenes import IMAGE_SIZE, Scenes, draw_scenes, render


def write_shard(folder: Path, number: int, scenes: Scenes) -> None:
    """Write one shard; the statistics come last and are the mark of a complete shard."""
    pictures = (render(scenes) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    table = []
    temporary = folder / f".tmp-{number:05d}.tar"
    with webdataset.TarWriter(str(temporary)) as writer:
        for i, picture in enumerate(pictures):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="JPEG", quality=95, subsampling=0)
            jpg, caption, key = buffer.getvalue(), scenes.caption(i), f"{number:05d}{i:04d}"
            row = {
                "url": f"tiny-world:{key}",
                "caption": caption,
                "key": key,
                "status": "success",
                "error_message": None,
                "width": IMAGE_SIZE,
                "height": IMAGE_SIZE,
                "original_width": IMAGE_SIZE,
                "original_height": IMAGE_SIZE,
                "exif": "{}",
                "sha256": hashlib.sha256(jpg).hexdigest(),
            }
            writer.write({"__key__": key, "jpg": jpg, "txt": caption, "json": json.dumps(row).encode()})
            table.append(row)
    temporary.rename(folder / f"{number:05d}.tar")
    pq.write_table(pa.Table.from_pylist(table), folder / f"{number:05d}.parquet")
    counts = {"count": len(table), "successes": len(table), "failed_to_download": 0, "failed_to_resize": 0}
    stats = {**counts, "status_dict": {"success": len(table)}}
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-shards", type=int, default=8)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=5_000_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for number in trange(args.num_shards, desc="shards", unit="shard"):
        if not (args.out / f"{number:05d}_stats.json").exists():
            write_shard(args.out, number, draw_scenes(args.per_shard, args.seed + number))


if __name__ == "__main__":
    main()
