use hello_mtls::{newest, Failure};
use rustls::pki_types::CertificateDer;
use rustls::{server::WebPkiClientVerifier, ServerConfig, ServerConnection, StreamOwned};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::{sync::Arc, thread, time::Duration};
use webpki::EndEntityCert;

/// Returns the SPIFFE ID, the only URI of the certificate.
fn identity(certificate: &CertificateDer) -> Result<String, Failure> {
    let parsed = EndEntityCert::try_from(certificate)?;
    let uri = parsed.valid_uri_names().next();
    Ok(uri.ok_or("no URI")?.to_owned())
}

fn serve(socket: TcpStream) -> Result<(), Failure> {
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    let files = newest()?;
    let clients = WebPkiClientVerifier::builder(files.roots).build()?;
    let config = ServerConfig::builder()
        .with_client_cert_verifier(clients)
        .with_single_cert(files.certificates, files.key)?;
    let mut tls = StreamOwned::new(ServerConnection::new(Arc::new(config))?, socket);
    for line in BufReader::new((&mut tls).take(4096)).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let client = identity(&tls.conn.peer_certificates().ok_or("no certificate")?[0])?;
    write!(tls, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello {client}\n")?;
    tls.conn.send_close_notify();
    Ok(tls.flush()?)
}

fn main() -> Result<(), Failure> {
    for socket in TcpListener::bind("0.0.0.0:8443")?.incoming() {
        thread::spawn(move || {
            if let Err(error) = socket.map_err(Failure::from).and_then(serve) {
                eprintln!("{error}");
            }
        });
    }
    Ok(())
}
