//! Device state at the target: what is refused, and when it is complete.

use super::*;

#[test]
fn device_state_that_does_not_fit_is_refused_by_name() {
    let too_new = Section {
        version: 3,
        ..section("vcpu/0")
    };
    let other_schema = Section {
        schema: "x".to_owned(),
        ..section("vcpu/0")
    };
    let announce = SourceFrame::Switchover(RoundId(3));
    let state = |name| SourceFrame::Section(section(name));
    let cases: [(&[SourceFrame], &str); 8] = [
        (&[announce.clone(), announce.clone()], "announced twice"),
        (&[state("vcpu/0")], "outside of the switchover"),
        (
            &[announce.clone(), state("vcpu/0"), state("vcpu/0")],
            "\"vcpu/0\" comes twice",
        ),
        (
            &[announce.clone(), state("gpu/0")],
            "\"gpu/0\" comes, which does not exist",
        ),
        (
            &[announce.clone(), SourceFrame::Section(too_new)],
            "version 3",
        ),
        (
            &[announce.clone(), SourceFrame::Section(other_schema)],
            "\"x\" version 2",
        ),
        (
            &[
                announce.clone(),
                state("vcpu/0"),
                SourceFrame::StateEnd(StateEnd {
                    sections: 1,
                    ..state_end()
                }),
            ],
            "no state came for device \"serial/0\"",
        ),
        (
            &[
                announce,
                state("vcpu/0"),
                state("serial/0"),
                SourceFrame::StateEnd(StateEnd {
                    last_round: RoundId(4),
                    ..state_end()
                }),
            ],
            "contradicts the switchover",
        ),
    ];
    for (frames, text) in cases {
        let mut target = receiving();
        for frame in frames {
            target.handle_frame(NOW, CONTROL, frame.clone());
        }
        assert_eq!(publish(&mut target), TargetStatus::Failing, "{text}");
        let error = target.error().unwrap().to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn a_device_with_a_stream_has_no_section() {
    for (sections, expected) in [
        (&["vcpu/0"][..], "Load"),
        (&["vcpu/0", "serial/0"], "\"serial/0\" has a stream"),
        (&[], "no state came for device \"vcpu/0\""),
    ] {
        let mut target = after_data_hellos(after_hello(listening_for_streams(&["serial/0"])));
        target.handle_prepared(NOW);
        target.handle_round_placed(NOW, RoundId(3), true);
        let state = sections.iter().copied().map(section);
        let end = StateEnd {
            sections: u16::try_from(sections.len()).unwrap(),
            ..state_end()
        };
        target.handle_frame(NOW, CONTROL, SourceFrame::Switchover(RoundId(3)));
        for frame in state.map(SourceFrame::Section) {
            target.handle_frame(NOW, CONTROL, frame);
        }
        target.handle_frame(NOW, CONTROL, SourceFrame::StateEnd(end));
        let said = match target.error() {
            Some(error) => error.to_string(),
            None => actions(&mut target).concat(),
        };
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn loading_waits_for_the_pages_and_for_the_state() {
    let mut target = receiving();
    target.handle_round_placed(NOW, RoundId(3), true);
    target.handle_frame(NOW, CONTROL, SourceFrame::Switchover(RoundId(3)));
    target.handle_frame(NOW, CONTROL, SourceFrame::Section(section("serial/0")));
    target.handle_frame(NOW, CONTROL, SourceFrame::Section(section("vcpu/0")));
    assert!(
        !actions(&mut target)
            .iter()
            .any(|action| action.starts_with("Load"))
    );
    target.handle_frame(NOW, CONTROL, SourceFrame::StateEnd(state_end()));
    assert!(
        actions(&mut target)
            .iter()
            .any(|action| action.starts_with("Load"))
    );
    let mut target = receiving();
    target.handle_round_placed(NOW, RoundId(2), true);
    for frame in [
        SourceFrame::Switchover(RoundId(3)),
        SourceFrame::Section(section("vcpu/0")),
        SourceFrame::Section(section("serial/0")),
        SourceFrame::StateEnd(state_end()),
    ] {
        target.handle_frame(NOW, CONTROL, frame);
    }
    assert_eq!(
        publish(&mut target),
        TargetStatus::Failing,
        "another round was the last"
    );
}
