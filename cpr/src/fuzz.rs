//! Arbitrary bytes against both halves of a hand-over: what must hold whatever the other process sends (I5).
//!
//! The fuzz target in `cpr/fuzz` calls these functions, and so do the tests below: on the corpus that the target has collected, and on
//! every committed fixture, on each of them cut short, and on each of them with one bit flipped. A broken promise is a panic.

use std::rc::Rc;

use vmferry_transport::units::{MigrationId, Moment};
use vmferry_transport::wire::frame::{ControlFrame, FrameBuffer};
use vmferry_transport::wire::header::{Reader, encode_frame};

use crate::give::{Giver, GiverAction, GiverDeadlines};
use crate::letter::{self, Letter};
use crate::manifest::{FDS_MAX, Manifest, Stage};
use crate::message::{BATCH_MAX, GiverMessage, TakerMessage};
use crate::take::{Taker, TakerAction, TakerDeadlines};

/// Bytes as they come from the socket, in either direction.
///
/// What is decoded survives being encoded and decoded again.
///
/// # Panics
/// If it does not.
pub fn stream(bytes: &[u8]) {
    let mut buffer = FrameBuffer::default();
    buffer.push(bytes);
    while let Ok(Some(message)) = buffer.poll_frame::<GiverMessage>() {
        check_giver(&message);
    }
    let mut buffer = FrameBuffer::default();
    buffer.push(bytes);
    while let Ok(Some(message)) = buffer.poll_frame::<TakerMessage>() {
        assert_eq!(again::<TakerMessage>(&message.encode()), message);
    }
}

/// A conversation: per message 1 byte type, 1 byte number of descriptors that come with it, 2 bytes length, and the body. Checksums are
/// put in, because random bytes hardly ever get past a wrong one. Runs against a taker that wants everything, and against a giver.
///
/// However it goes, each descriptor ends up with exactly one owner or closed, and nothing with an owner leaves the giver unasked.
///
/// # Panics
/// If one of this does not hold.
pub fn conversation(bytes: &[u8]) {
    let mut reader = Reader::new(bytes);
    let mut fds: Vec<Rc<()>> = Vec::new();
    let mut claimed = Vec::new();
    let mut taker = Taker::start(Moment(0), "new".to_owned(), TakerDeadlines::default());
    let mut giver = Giver::start(
        Moment(0),
        MigrationId::default(),
        "old".to_owned(),
        Manifest::default(),
        GiverDeadlines::default(),
    );
    while let Some((frame, count)) = next_frame(&mut reader) {
        let mut buffer = FrameBuffer::default();
        buffer.push(&frame);
        if let Ok(Some(message)) = buffer.poll_frame::<GiverMessage>() {
            check_giver(&message);
            let with: Vec<_> = (0..count).map(|_| Rc::new(())).collect();
            fds.extend(with.iter().cloned());
            taker.handle_message(Moment(1), message, with);
            follow(&mut taker, &mut claimed);
        }
        let mut buffer = FrameBuffer::default();
        buffer.push(&frame);
        if let Ok(Some(message)) = buffer.poll_frame::<TakerMessage>() {
            giver.handle_message(Moment(1), message);
            while let Some(action) = giver.poll_action() {
                let leaves = GiverAction::Send(GiverMessage::Stage(Stage::HandOver));
                assert_ne!(action, leaves, "something left unasked");
            }
        }
    }
    let accounts = taker.accounts();
    assert_eq!(accounts.claimed, claimed.len());
    assert!(accounts.arrived >= accounts.claimed + accounts.closed);
    drop(taker);
    let open = fds.iter().filter(|fd| Rc::strong_count(fd) > 1).count();
    assert_eq!(open, claimed.len(), "descriptors leak");
}

/// Bytes as they might be in the memfd of a letter, as they are and behind a head with right checksums.
///
/// What is read can be written, and is the same bytes again; no number is a standard stream or there twice.
///
/// # Panics
/// If one of this does not hold.
pub fn letter(bytes: &[u8]) {
    check_letter(bytes);
    let Some((leg, body)) = bytes.split_first() else {
        return;
    };
    let mut whole = letter::MAGIC.to_vec();
    whole.extend_from_slice(&letter::VERSION.to_le_bytes());
    whole.extend_from_slice(&[leg % 4, 0]);
    whole.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    whole.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
    whole.extend_from_slice(&crc32c::crc32c(&whole).to_le_bytes());
    whole.extend_from_slice(body);
    check_letter(&whole);
}

fn check_letter(bytes: &[u8]) {
    let Ok(letter) = Letter::decode(bytes) else {
        return;
    };
    let mut numbers = letter.numbers.clone();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), letter.numbers.len());
    assert!(numbers.iter().all(|number| *number >= letter::NUMBER_MIN));
    assert!(letter.manifest.entries().len() <= FDS_MAX);
    assert_eq!(letter.encode().as_deref(), Ok(bytes));
}

fn next_frame(reader: &mut Reader<'_>) -> Option<(Vec<u8>, usize)> {
    let kind = reader.u8().ok()?;
    let count = usize::from(reader.u8().ok()?);
    let len = usize::from(reader.u16().ok()?);
    let body = match reader.bytes(len) {
        Ok(body) => body,
        Err(_) => reader.rest(),
    };
    Some((encode_frame(kind, 0, body), count))
}

fn follow(taker: &mut Taker<Rc<()>>, claimed: &mut Vec<Rc<()>>) {
    while let Some(action) = taker.poll_action() {
        match action {
            TakerAction::Judge => taker.accept(Moment(1)),
            TakerAction::Arrived(stage) => {
                let range = taker.manifest().range(stage);
                let entries = taker.manifest().entries()[range].to_vec();
                for entry in entries {
                    let fd = taker
                        .table()
                        .claim(&entry.name, &entry.role, entry.kind)
                        .expect("everything of a stage that has arrived is there");
                    claimed.push(fd);
                }
                taker.taken(Moment(1)).expect("all was claimed");
            }
            TakerAction::Send(_) | TakerAction::Failed(_) => {}
        }
    }
}

fn check_giver(message: &GiverMessage) {
    match message {
        GiverMessage::Offer(offer) => {
            let Ok(manifest) = &offer.manifest else {
                return;
            };
            assert!(manifest.entries().len() <= FDS_MAX);
            let early = &manifest.entries()[manifest.range(Stage::Prepare)];
            assert!(early.iter().all(|entry| !entry.kind.has_one_owner()));
        }
        GiverMessage::Fds { count, .. } => assert!((1..=BATCH_MAX).contains(&(*count as usize))),
        GiverMessage::Stage(_) | GiverMessage::GiveUp(_) => {}
    }
    assert_eq!(&again::<GiverMessage>(&message.encode()), message);
}

fn again<M: ControlFrame>(frame: &[u8]) -> M {
    let mut buffer = FrameBuffer::default();
    buffer.push(frame);
    let message = buffer
        .poll_frame()
        .expect("what was encoded can be decoded");
    message.expect("what was encoded is complete")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn files(folder: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let entries = std::fs::read_dir(folder).unwrap();
        entries
            .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
            .collect()
    }

    #[test]
    fn no_hand_over_of_the_corpus_breaks_a_promise() {
        let inputs = files("fuzz/corpus/hand_over");
        assert!(inputs.len() > 20, "only {} inputs", inputs.len());
        for bytes in inputs {
            stream(&bytes);
            conversation(&bytes);
        }
    }

    #[test]
    fn no_letter_of_the_corpus_or_the_fixtures_breaks_a_promise_whole_cut_or_changed() {
        let mut letters = files("fuzz/corpus/letter");
        assert!(letters.len() > 10, "only {} inputs", letters.len());
        letters.extend(files("../tests/fixtures/cpr/letter/v1/good"));
        letters.extend(files("../tests/fixtures/cpr/letter/v1/corrupt"));
        for bytes in letters {
            letter(&bytes);
            for cut in 0..bytes.len() {
                letter(&bytes[..cut]);
            }
            for bit in 0..bytes.len() * 8 {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                letter(&changed);
            }
        }
    }

    #[test]
    fn no_fixture_breaks_a_hand_over_whole_cut_or_changed() {
        let mut frames = files("../tests/fixtures/cpr/v1/good");
        frames.extend(files("../tests/fixtures/cpr/v1/corrupt"));
        assert!(frames.len() > 15, "only {} fixtures", frames.len());
        for frame in frames {
            stream(&frame);
            for cut in 0..frame.len() {
                stream(&frame[..cut]);
            }
            for bit in 0..frame.len() * 8 {
                let mut changed = frame.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                stream(&changed);
            }
        }
    }
}
