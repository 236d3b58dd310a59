//! Is a page of guest memory zero? Asked for every page of the first round, so its cost has to vanish beside sending a page.
//!
//! `zero` reads the whole page. `first_word` is what most pages in use look like. `last_unsampled_byte` is the worst page that is not
//! zero: all but its one set byte has to be read.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput};
use vm_memory::{GuestAddress, GuestRegionMmap};
use vmferry_transport::memory::RamBlock;
use vmferry_transport::memory::zero::{GuestPage, PAGE_BYTES};
use vmferry_transport::units::PageIndex;

/// 4 MiB: stays in the second-level cache of most machines, as pages just sent do not; the scan itself is what is measured.
const PAGES: u64 = 1024;

fn block() -> RamBlock {
    let bytes = usize::try_from(PAGES).expect("a small number") * PAGE_BYTES;
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), bytes, None)
        .expect("4 MiB of anonymous memory");
    RamBlock::new("ram", Arc::new(region)).expect("a block of whole pages")
}

fn zero(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page_is_zero");
    group.throughput(Throughput::Bytes(PAGES * PAGE_BYTES as u64));
    let cases = [
        ("zero", None),
        ("first_word", Some(0)),
        ("last_unsampled_byte", Some(PAGE_BYTES - 9)),
    ];
    for (name, set_byte) in cases {
        let block = block();
        let pages: Vec<_> = (0..PAGES)
            .map(|index| GuestPage::of(&block, PageIndex(index)).expect("inside the block"))
            .collect();
        let mut content = [0; PAGE_BYTES];
        if let Some(at) = set_byte {
            content[at] = 1;
        }
        for page in &pages {
            page.copy_from(&content);
            assert_eq!(page.is_zero(), set_byte.is_none(), "{name}");
        }
        group.bench_with_input(name, &pages, |bencher, pages| {
            bencher.iter(|| {
                black_box(pages)
                    .iter()
                    .filter(|page| page.is_zero())
                    .count()
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    zero(&mut criterion);
    criterion.final_summary();
}
