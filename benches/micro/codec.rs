//! Encoding and decoding the RAM_RUNS frame, the only one whose cost grows with the pages that are sent.
//!
//! `runs_1` is the common frame of a first round, 4 MiB in one run; `runs_512` is the worst frame, single pages scattered over the
//! block. Throughput counts the pages announced, so that it compares with the rate of a link.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use vmferry_transport::units::{BlockId, PageCount, PageIndex, PageRun, RoundId};
use vmferry_transport::wire::header::{FrameHeader, HEADER_BYTES};
use vmferry_transport::wire::ram::{RamRun, RamRuns, RunKind};

const BLOCK_PAGES: PageCount = PageCount(1 << 20);

fn frame(runs: u64, pages_per_run: u64) -> RamRuns {
    let run = |index| RamRun {
        pages: PageRun {
            block: BlockId(0),
            start: PageIndex(index * 2 * pages_per_run),
            count: PageCount(pages_per_run),
        },
        kind: RunKind::Data,
    };
    RamRuns {
        round: RoundId(1),
        payload_crc: None,
        runs: (0..runs).map(run).collect(),
    }
}

fn decode(bytes: &[u8]) -> RamRuns {
    let (header, body) = bytes
        .split_first_chunk::<HEADER_BYTES>()
        .expect("a whole frame");
    let header = FrameHeader::decode(header).expect("our own header");
    RamRuns::decode(&header, body, &[BLOCK_PAGES]).expect("our own frame")
}

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ram_frame");
    for (runs, pages_per_run) in [(1, 1024), (512, 1)] {
        let frame = frame(runs, pages_per_run);
        let bytes = frame.encode();
        assert_eq!(decode(&bytes), frame, "what is measured must be right");
        group.throughput(Throughput::Bytes(frame.payload_bytes()));
        group.bench_with_input(
            BenchmarkId::new("encode", format!("runs_{runs}")),
            &frame,
            |bencher, frame| {
                bencher.iter(|| black_box(frame).encode());
            },
        );
        group.bench_with_input(
            BenchmarkId::new("decode", format!("runs_{runs}")),
            &bytes,
            |bencher, bytes| {
                bencher.iter(|| decode(black_box(bytes)));
            },
        );
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    codec(&mut criterion);
    criterion.final_summary();
}
