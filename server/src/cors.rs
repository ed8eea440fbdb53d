//! Which web pages may use the server from a browser.

use hyper::{
    Method,
    header::{HeaderName, HeaderValue},
};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use crate::Error;

/// Every origin, method or header.
const ANY: &str = "*";

/// What browsers are told, from lists that may hold `*`; `None` if no origin is allowed.
///
/// # Errors
/// [`Error::Config`] naming the option with a value that cannot be.
pub fn layer(
    origins: &[String],
    methods: &[String],
    headers: &[String],
    with_credentials: bool,
) -> Result<Option<CorsLayer>, Error> {
    if origins.is_empty() {
        return Ok(None);
    }
    fn list<T: std::str::FromStr>(flag: &'static str, texts: &[String]) -> Result<Option<Vec<T>>, Error> {
        if texts.iter().any(|text| text == ANY) {
            return Ok(None);
        }
        let parse =
            |text: &String| text.parse().map_err(|_| Error::config(flag, format!("`{text}` cannot be allowed")));
        texts.iter().map(parse).collect::<Result<Vec<T>, _>>().map(Some)
    }
    let origins = list::<HeaderValue>("--allowed-origins", origins)?;
    let methods = list::<Method>("--allowed-methods", methods)?;
    let headers = list::<HeaderName>("--allowed-headers", headers)?;
    // Browsers take no `*` beside credentials; what they ask for is echoed instead.
    let layer = CorsLayer::new()
        .allow_origin(origins.map_or_else(AllowOrigin::mirror_request, AllowOrigin::list))
        .allow_methods(methods.map_or_else(AllowMethods::mirror_request, AllowMethods::list))
        .allow_headers(headers.map_or_else(AllowHeaders::mirror_request, AllowHeaders::list))
        .allow_credentials(with_credentials);
    Ok(Some(layer))
}
