//! As much HTTP/1.1 as a scraper needs: one GET or HEAD per connection, a bounded head, no body.

use httparse::{EMPTY_HEADER, Request, Status};
use vmferry_transport::control::Stream;

/// Longest request head. Prometheus sends some 300 bytes.
const HEAD_BYTES_MAX: usize = 8192;
/// Most header lines.
const HEADERS_MAX: usize = 64;
/// The format of the text, as its encoder writes it.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a request asks for.
#[derive(Debug, Eq, PartialEq)]
enum Wish {
    /// Not all of it is here yet.
    Incomplete,
    Get(String),
    Head(String),
    /// Refused, with this status.
    Refused(&'static str),
}

/// Reads one request and answers it. `find` makes the content of a path, or has none.
pub(super) async fn converse(stream: &Stream, find: impl FnOnce(&str) -> Option<String>) {
    let mut head = Vec::with_capacity(1024);
    let mut buf = Vec::with_capacity(1024);
    let wish = loop {
        let read;
        (read, buf) = stream.read(buf).await;
        match read {
            // It has changed its mind, or its time is over.
            Ok(0) | Err(_) => return,
            Ok(_) => head.extend_from_slice(&buf),
        }
        match parse(&head) {
            Wish::Incomplete if head.len() >= HEAD_BYTES_MAX => {
                break Wish::Refused("431 Request Header Fields Too Large");
            }
            Wish::Incomplete => {}
            wish => break wish,
        }
    };
    let response = match wish {
        Wish::Get(path) => match find(&path) {
            Some(text) => response("200 OK", CONTENT_TYPE, &text, true),
            None => refusal("404 Not Found"),
        },
        Wish::Head(path) => match find(&path) {
            Some(text) => response("200 OK", CONTENT_TYPE, &text, false),
            None => refusal("404 Not Found"),
        },
        Wish::Refused(status) => refusal(status),
        Wish::Incomplete => return,
    };
    // A client that has left does not want it any more.
    let _ = stream.write_all(response).await;
}

fn parse(head: &[u8]) -> Wish {
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    let mut request = Request::new(&mut headers);
    match request.parse(head) {
        Ok(Status::Partial) => Wish::Incomplete,
        Ok(Status::Complete(_)) => {
            let path = request.path.unwrap_or_default();
            let path = path
                .split_once('?')
                .map_or(path, |(path, _)| path)
                .to_owned();
            match request.method {
                Some("GET") => Wish::Get(path),
                Some("HEAD") => Wish::Head(path),
                _ => Wish::Refused("405 Method Not Allowed"),
            }
        }
        Err(httparse::Error::TooManyHeaders) => {
            Wish::Refused("431 Request Header Fields Too Large")
        }
        Err(_) => Wish::Refused("400 Bad Request"),
    }
}

fn refusal(status: &'static str) -> Vec<u8> {
    let text = format!("{status}\nmetrics are at /metrics\n");
    response(status, "text/plain; charset=utf-8", &text, true)
}

fn response(status: &str, content_type: &str, text: &str, with_body: bool) -> Vec<u8> {
    let length = text.len();
    let allow = if status.starts_with("405") {
        "Allow: GET, HEAD\r\n"
    } else {
        ""
    };
    let body = if with_body { text } else { "" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{allow}\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_understood_when_its_head_is_complete() {
        let whole = b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\n\r\n";
        for cut in 0..whole.len() {
            assert_eq!(parse(&whole[..cut]), Wish::Incomplete, "{cut}");
        }
        assert_eq!(parse(whole), Wish::Get("/metrics".to_owned()));
        assert_eq!(
            parse(b"HEAD / HTTP/1.0\r\n\r\n"),
            Wish::Head("/".to_owned())
        );
    }

    #[test]
    fn anything_else_is_refused_with_a_status() {
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "A: b\r\n".repeat(HEADERS_MAX + 1)
        );
        for (request, status) in [
            (b"POST /metrics HTTP/1.1\r\n\r\n".as_slice(), "405"),
            (b"\x16\x03\x01\x02\x00", "400"),
            (b"GET  / HTTP/1.1\r\n\r\n", "400"),
            (b"GET / HTTP/9.9\r\n\r\n", "400"),
            (many.as_bytes(), "431"),
        ] {
            match parse(request) {
                Wish::Refused(refused) => assert!(refused.starts_with(status), "{refused}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_response_says_how_long_it_is() {
        let text = String::from_utf8(response("200 OK", CONTENT_TYPE, "a 1\n", true)).unwrap();
        assert!(text.contains("\r\nContent-Length: 4\r\n"));
        assert!(text.ends_with("\r\n\r\na 1\n"));
        let head = String::from_utf8(response("200 OK", CONTENT_TYPE, "a 1\n", false)).unwrap();
        assert!(head.contains("Content-Length: 4") && head.ends_with("\r\n\r\n"));
        assert!(
            refusal("405 Method Not Allowed")
                .windows(6)
                .any(|part| part == b"Allow:")
        );
    }
}
