// Command smux is the benchmark's tunnel with xtaci/smux over Go's TLS 1.3.
package main

import (
	"net"

	"github.com/xtaci/smux"

	"konnektor/bench/tunnel"
)

func config() *smux.Config {
	config := smux.DefaultConfig()
	config.Version = 2 // flow control for each stream
	config.MaxFrameSize = 65535
	config.MaxStreamBuffer = 4 << 20
	config.MaxReceiveBuffer = 64 << 20
	return config
}

type session struct{ *smux.Session }

func (s session) Open() (tunnel.Stream, error)   { return s.Session.OpenStream() }
func (s session) Accept() (tunnel.Stream, error) { return s.Session.AcceptStream() }

func main() {
	tunnel.Main(
		func(conn net.Conn) (tunnel.Session, error) {
			made, err := smux.Server(conn, config())
			return session{made}, err
		},
		func(conn net.Conn) (tunnel.Session, error) {
			made, err := smux.Client(conn, config())
			return session{made}, err
		},
	)
}
