//! Drawings that are not plots: the phases and rounds on the time axis, and the parts of the blackout.

use std::fmt::Write;

use super::chart::{Axis, Band, LEFT, RIGHT, WIDTH, nothing};
use super::html::Text;
use super::units::real;
use crate::cli::size::duration;
use crate::observe::record::{BlackoutPart, MigrationRecord};

/// About how wide a character is.
const CHARACTER: f64 = 7.0;
const LANE: f64 = 26.0;
const BAR: f64 = 44.0;

/// The phases of a record: each lasts until the next begins.
pub(super) fn bands(record: &MigrationRecord) -> Vec<Band> {
    let ends = record.timeline.iter().skip(1).map(|change| change.at_us);
    let ends = ends.chain([record.duration_us]);
    record
        .timeline
        .iter()
        .zip(ends)
        .map(|(change, to_us)| Band {
            from_us: change.at_us,
            to_us: to_us.max(change.at_us),
            name: change.status.name(),
        })
        .collect()
}

/// Phases above, rounds below.
pub(super) fn draw_phases(record: &MigrationRecord, axis: &Axis, page: &mut String) {
    let rounds = !record.rounds.is_empty();
    let bottom = if rounds { 2.0 * LANE + 4.0 } else { LANE };
    let height = bottom + 36.0;
    let about = phases_in_words(record);
    let _ = write!(
        page,
        "<figure class=\"plot\" id=\"plot-phases\"><figcaption><h2>Phases and rounds</h2><p>{}</p></figcaption>\
         <div class=\"scroll\"><svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-labelledby=\"title-phases desc-phases\"><title id=\"title-phases\">Phases and rounds</title>\
         <desc id=\"desc-phases\">{}</desc>",
        Text(&about),
        Text(&about)
    );
    axis.draw(page, 0.0, bottom);
    let _ = write!(
        page,
        "<text class=\"lane\" x=\"{:.1}\" y=\"17\" text-anchor=\"end\">phase</text>",
        LEFT - 8.0
    );
    for band in &axis.bands {
        let label = format!("{}, {}", band.name, duration(band.to_us - band.from_us));
        segment(
            page,
            axis,
            (band.from_us, band.to_us),
            0.0,
            band.name,
            band.name,
            &label,
        );
    }
    if rounds {
        let top = LANE + 4.0;
        let _ = write!(
            page,
            "<text class=\"lane\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">round</text>",
            LEFT - 8.0,
            top + 17.0
        );
        for round in &record.rounds {
            let to_us = round.began_us.saturating_add(round.duration_us);
            let class = match (round.last, round.number % 2) {
                (true, _) => "round last",
                (false, 0) => "round even",
                (false, _) => "round odd",
            };
            let name = round.number.to_string();
            let label = format!("round {name}, {}", duration(round.duration_us));
            segment(
                page,
                axis,
                (round.began_us, to_us),
                top,
                class,
                &name,
                &label,
            );
        }
    }
    page.push_str("</svg></div></figure>\n");
}

fn segment(
    page: &mut String,
    axis: &Axis,
    (from_us, to_us): (u64, u64),
    top: f64,
    class: &str,
    name: &str,
    label: &str,
) {
    let (from, to) = (axis.x(from_us), axis.x(to_us));
    let width = (to - from).max(2.0);
    // A seam would hide what is hardly wider than it.
    let class = if width < 6.0 {
        format!("{class} thin")
    } else {
        class.to_owned()
    };
    let _ = write!(
        page,
        "<g><title>{label}</title><rect class=\"segment {class}\" x=\"{from:.1}\" y=\"{top}\" width=\"{width:.1}\" \
         height=\"{LANE}\"/>"
    );
    if fits(name, width) {
        let _ = write!(
            page,
            "<text class=\"inside\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            from + width / 2.0,
            top + 17.0
        );
    }
    page.push_str("</g>");
}

fn fits(text: &str, width: f64) -> bool {
    real(text.chars().count() as u64) * CHARACTER + 8.0 < width
}

fn phases_in_words(record: &MigrationRecord) -> String {
    let phases = bands(record);
    let phases = phases
        .iter()
        .filter(|band| band.to_us > band.from_us)
        .map(|band| format!("{} {}", band.name, duration(band.to_us - band.from_us)));
    let shown: Vec<_> = phases.take(12).collect();
    shown.join(", ")
}

/// The blackout as a bar whose parts add up to it, with a table of them.
pub(super) fn draw_blackout(parts: &[BlackoutPart], page: &mut String) {
    let total_us = parts
        .iter()
        .map(|part| part.duration_us)
        .fold(0, u64::saturating_add);
    if total_us == 0 {
        let why = "Known to the source, of a migration that completed.";
        nothing(page, "blackout", "Blackout", why);
        return;
    }
    page.push_str("<figure class=\"plot\" id=\"plot-blackout\"><figcaption><h2>Blackout</h2>");
    let total = duration(total_us);
    let _ = write!(
        page,
        "<p>The guest stood still for {total}, from the order to stop until the target's word that it runs. The parts follow each other.</p>\
         </figcaption><div class=\"scroll\"><svg viewBox=\"0 0 {WIDTH} {BAR}\" role=\"img\" \
         aria-labelledby=\"title-blackout desc-blackout\"><title id=\"title-blackout\">Blackout in parts</title>\
         <desc id=\"desc-blackout\">The table below has the same figures.</desc>"
    );
    let mut from = 1.0;
    let shown = parts
        .iter()
        .enumerate()
        .filter(|(_, part)| part.duration_us > 0);
    for (number, part) in shown.clone() {
        let width = real(part.duration_us) / real(total_us) * (RIGHT + 14.0);
        let took = duration(part.duration_us);
        let _ = write!(
            page,
            "<g><title>{name}: {took}</title><rect class=\"part c{}\" x=\"{from:.1}\" y=\"1\" width=\"{:.1}\" height=\"{:.1}\"/>",
            number % 10,
            width.max(0.5),
            BAR - 2.0,
            name = Text(&part.part),
        );
        for label in [format!("{} {took}", part.part), took.clone()] {
            if fits(&label, width) {
                let _ = write!(
                    page,
                    "<text class=\"inside\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                    from + width / 2.0,
                    BAR / 2.0 + 4.5,
                    Text(&label)
                );
                break;
            }
        }
        page.push_str("</g>");
        from += width;
    }
    page.push_str(
        "</svg></div><table class=\"parts\"><thead><tr><th>Part</th><th>Time</th><th>Share</th></tr></thead><tbody>",
    );
    for (number_of, part) in shown {
        let share = real(part.duration_us) / real(total_us) * 100.0;
        let _ = write!(
            page,
            "<tr><th scope=\"row\"><span class=\"swatch c{}\"></span>{}</th><td>{}</td><td>{}&#8239;%</td></tr>",
            number_of % 10,
            Text(&part.part),
            duration(part.duration_us),
            format_args!("{share:.1}")
        );
    }
    let _ = writeln!(
        page,
        "</tbody><tfoot><tr><th scope=\"row\">All of it</th><td>{total}</td><td>100&#8239;%</td></tr></tfoot></table></figure>"
    );
}
