//! From a dirty bitmap to runs of pages, for a block of 4 GiB.
//!
//! Throughput counts the memory that the bitmap stands for. `every_second_page` is the worst case: as many runs as there can be.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use vmferry_transport::memory::PageBitmap;
use vmferry_transport::units::{BlockId, PageCount, PageIndex};

const PAGES: PageCount = PageCount(1 << 20);

fn marked(first: u64, step: usize, run: u64) -> PageBitmap {
    let mut bitmap = PageBitmap::new(PAGES);
    for start in (first..PAGES.0).step_by(step) {
        bitmap.set_range(PageIndex(start), PageCount(run));
    }
    bitmap
}

fn runs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bitmap_to_runs");
    group.throughput(Throughput::Bytes(PAGES.to_bytes()));
    let cases = [
        ("clean", PageBitmap::new(PAGES), 0),
        ("all_dirty", marked(0, 1 << 20, PAGES.0), 1),
        ("one_page_in_1024", marked(7, 1024, 1), 1 << 10),
        ("every_second_page", marked(0, 2, 1), 1 << 19),
    ];
    for (name, bitmap, expected_runs) in &cases {
        assert_eq!(bitmap.runs(BlockId(0)).count(), *expected_runs, "{name}");
        group.bench_with_input(*name, bitmap, |bencher, bitmap| {
            bencher.iter(|| {
                black_box(bitmap)
                    .runs(BlockId(0))
                    .map(|run| run.count.0)
                    .sum::<u64>()
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    runs(&mut criterion);
    criterion.final_summary();
}
