//! A plot over time as SVG: lines, or areas on top of each other.

use std::fmt::Write;

use serde_json::{Value, json};

use super::html::Text;
use super::units::{Quantity, axis_end, number, real, ticks, time_scale};

/// Width of every drawing, in its own units; at full size, one is a pixel.
pub(super) const WIDTH: f64 = 960.0;
/// Where the time axis begins and ends.
pub(super) const LEFT: f64 = 76.0;
pub(super) const RIGHT: f64 = WIDTH - 16.0;
const HEIGHT: f64 = 216.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = HEIGHT - 36.0;
/// Most points in one line: there are no more pixels.
const POINTS_MAX: usize = 900;

/// The time axis, the same in all drawings of a page.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    /// Its end, in microseconds.
    pub(super) end_us: u64,
    /// Phases that are shaded in every plot.
    pub(super) bands: Vec<Band>,
}

/// A phase.
#[derive(Clone, Debug)]
pub(super) struct Band {
    pub(super) from_us: u64,
    pub(super) to_us: u64,
    /// Name of the status.
    pub(super) name: &'static str,
}

impl Axis {
    /// Where a moment is.
    pub(super) fn x(&self, at_us: u64) -> f64 {
        let end = real(self.end_us.max(1));
        LEFT + (real(at_us) / end).min(1.0) * (RIGHT - LEFT)
    }

    /// The marks of the time axis with their labels, from `top` to `bottom`.
    pub(super) fn draw(&self, svg: &mut String, top: f64, bottom: f64) {
        let scale = time_scale(self.end_us);
        let end = real(self.end_us.max(1)) / scale.size;
        let _ = write!(svg, "<g class=\"axis\">");
        for mark in ticks(end, 9.0) {
            let x = LEFT + mark / end * (RIGHT - LEFT);
            let label = number(mark);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                bottom + 16.0
            );
        }
        let _ = write!(
            svg,
            "<text class=\"unit\" x=\"{RIGHT:.1}\" y=\"{:.1}\" text-anchor=\"end\">{} since begin</text></g>",
            bottom + 31.0,
            scale.unit
        );
    }
}

/// One line, or one layer of a stack.
#[derive(Clone, Debug, Default)]
pub(super) struct Series {
    pub(super) label: String,
    /// Moments and values, in order. Holes are no values.
    pub(super) points: Vec<(u64, f64)>,
}

/// How the values are drawn.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Form {
    /// Lines.
    Lines,
    /// Values that hold until the next one.
    Steps,
    /// Layers that add up; all series have the same moments.
    Stack,
}

/// A plot.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    /// Identity in the page.
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    /// What is to be seen, in a sentence.
    pub(super) about: String,
    pub(super) quantity: Quantity,
    pub(super) form: Form,
    pub(super) series: Vec<Series>,
    /// Said instead of a plot when there are no values.
    pub(super) empty: &'static str,
}

impl Chart {
    /// Writes the plot, and returns what the script needs to know of it.
    pub(super) fn draw(mut self, axis: &Axis, page: &mut String) -> Option<Value> {
        self.series.retain(|series| !series.points.is_empty());
        for series in &mut self.series {
            thin(&mut series.points);
        }
        let Self {
            id, title, about, ..
        } = &self;
        if self.series.is_empty() {
            nothing(page, id, title, self.empty);
            return None;
        }
        let _ = write!(
            page,
            "<figure class=\"plot\" id=\"plot-{id}\"><figcaption><h2>{title}</h2><p>{}</p></figcaption>",
            Text(about)
        );
        self.legend(page);
        let drawn = self.svg(axis, page);
        page.push_str("</figure>\n");
        Some(drawn)
    }

    fn legend(&self, page: &mut String) {
        if self.series.len() < 2 {
            return;
        }
        page.push_str("<ul class=\"legend\">");
        for (number, series) in self.series.iter().enumerate() {
            let _ = write!(
                page,
                "<li><span class=\"swatch c{}\"></span>{}</li>",
                number % 8,
                Text(&series.label)
            );
        }
        page.push_str("</ul>");
    }

    fn svg(&self, axis: &Axis, page: &mut String) -> Value {
        let tops = self.stacked();
        let all = tops
            .iter()
            .flat_map(|line| line.iter().map(|(_, value)| *value));
        let max = all.fold(0.0, f64::max);
        let scale = self.quantity.scale(max);
        let end = axis_end(max / scale.size);
        let y = |value: f64| BOTTOM - value / scale.size / end * (BOTTOM - TOP);
        let id = self.id;
        let _ = write!(
            page,
            "<div class=\"scroll\"><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" tabindex=\"0\" \
             aria-labelledby=\"title-{id} desc-{id}\" data-plot=\"{id}\">\
             <title id=\"title-{id}\">{}</title><desc id=\"desc-{id}\">{}</desc>",
            self.title,
            Text(&self.about)
        );
        for band in &axis.bands {
            let (from, to) = (axis.x(band.from_us), axis.x(band.to_us));
            let _ = write!(
                page,
                "<rect class=\"band {}\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                band.name,
                (to - from).max(1.0),
                BOTTOM - TOP
            );
        }
        axis.draw(page, TOP, BOTTOM);
        page.push_str("<g class=\"axis\">");
        for mark in ticks(if max > 0.0 { end } else { 0.0 }, 5.0) {
            let at = y(mark * scale.size);
            let _ = write!(
                page,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                at + 4.0,
                number(mark)
            );
        }
        let _ = write!(
            page,
            "<text class=\"unit\" x=\"{:.1}\" y=\"13\" text-anchor=\"end\">{}</text></g>",
            LEFT - 8.0,
            scale.unit
        );
        for (number, line) in tops.iter().enumerate() {
            let below = number.checked_sub(1).map(|below| tops[below].as_slice());
            self.draw_line(page, axis, &y, number % 8, line, below);
        }
        page.push_str("</svg></div>");
        self.data(axis, scale.unit, scale.size)
    }

    fn draw_line(
        &self,
        page: &mut String,
        axis: &Axis,
        y: &impl Fn(f64) -> f64,
        colour: usize,
        line: &[(u64, f64)],
        below: Option<&[(u64, f64)]>,
    ) {
        let mut path = String::new();
        let mut last_y = None;
        for (at_us, value) in line {
            let (x, y) = (axis.x(*at_us), y(*value));
            match last_y {
                None => {
                    let _ = write!(path, "M{x:.1} {y:.1}");
                }
                Some(last) if self.form == Form::Steps => {
                    let _ = write!(path, "L{x:.1} {last:.1}L{x:.1} {y:.1}");
                }
                Some(_) => {
                    let _ = write!(path, "L{x:.1} {y:.1}");
                }
            }
            last_y = Some(y);
        }
        // A single value would be a line of no length.
        if let [(at_us, value)] = line {
            let (x, y) = (axis.x(*at_us), y(*value));
            let _ = write!(
                page,
                "<circle class=\"dot c{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>"
            );
        }
        // The area under the line, or down to the layer below.
        let mut area = path.clone();
        match below {
            Some(below) if self.form == Form::Stack => {
                for (at_us, value) in below.iter().rev() {
                    let _ = write!(area, "L{:.1} {:.1}", axis.x(*at_us), y(*value));
                }
            }
            _ => {
                if let (Some((first, _)), Some((last, _))) = (line.first(), line.last()) {
                    let (first, last) = (axis.x(*first), axis.x(*last));
                    let _ = write!(area, "L{last:.1} {BOTTOM}L{first:.1} {BOTTOM}");
                }
            }
        }
        if self.form == Form::Stack || self.series.len() == 1 {
            let _ = write!(page, "<path class=\"area c{colour}\" d=\"{area}Z\"/>");
        }
        let _ = write!(page, "<path class=\"line c{colour}\" d=\"{path}\"/>");
    }

    /// The upper edges of what is drawn.
    fn stacked(&self) -> Vec<Vec<(u64, f64)>> {
        let mut tops: Vec<Vec<(u64, f64)>> = Vec::new();
        for series in &self.series {
            let mut top = series.points.clone();
            if let (Form::Stack, Some(below)) = (self.form, tops.last()) {
                for (point, below) in top.iter_mut().zip(below) {
                    point.1 += below.1;
                }
            }
            tops.push(top);
        }
        tops
    }

    /// What the script shows when somebody points at the plot.
    fn data(&self, axis: &Axis, unit: &str, size: f64) -> Value {
        let series: Vec<_> = self
            .series
            .iter()
            .map(|series| {
                let times: Vec<_> = series.points.iter().map(|(at_us, _)| *at_us).collect();
                let values: Vec<_> = series
                    .points
                    .iter()
                    .map(|(_, value)| (value / size * 1000.0).round() / 1000.0)
                    .collect();
                json!({ "label": series.label, "times": times, "values": values })
            })
            .collect();
        json!({
            "id": self.id, "unit": unit, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM,
            "end": axis.end_us, "series": series,
        })
    }
}

/// Says that there is nothing to draw, and why.
pub(super) fn nothing(page: &mut String, id: &str, title: &str, why: &str) {
    let _ = writeln!(
        page,
        "<figure class=\"plot nothing\" id=\"plot-{id}\"><figcaption><h2>{title}</h2></figcaption>\
         <p class=\"empty\">{why}</p></figure>"
    );
}

/// Leaves out points that nobody could see, never the last.
fn thin(points: &mut Vec<(u64, f64)>) {
    let every = points.len().div_ceil(POINTS_MAX).max(1);
    let last = points.len().saturating_sub(1);
    let mut index = 0;
    points.retain(|_| {
        let keep = index % every == 0 || index == last;
        index += 1;
        keep
    });
}
