// Command yamux is the benchmark's tunnel with hashicorp/yamux over Go's TLS 1.3.
package main

import (
	"io"
	"net"

	"github.com/hashicorp/yamux"

	"konnektor/bench/tunnel"
)

func config() *yamux.Config {
	config := yamux.DefaultConfig()
	config.MaxStreamWindowSize = 4 << 20
	config.AcceptBacklog = 4096
	config.LogOutput = io.Discard
	return config
}

type session struct{ *yamux.Session }

// Stream.Close of yamux ends the writing direction, and no more.
type stream struct{ *yamux.Stream }

func (s stream) CloseWrite() error { return s.Stream.Close() }

func wrap(s *yamux.Stream, err error) (tunnel.Stream, error) {
	if err != nil {
		return nil, err
	}
	return stream{s}, nil
}

func (s session) Open() (tunnel.Stream, error)   { return wrap(s.Session.OpenStream()) }
func (s session) Accept() (tunnel.Stream, error) { return wrap(s.Session.AcceptStream()) }

func main() {
	tunnel.Main(
		func(conn net.Conn) (tunnel.Session, error) {
			made, err := yamux.Server(conn, config())
			return session{made}, err
		},
		func(conn net.Conn) (tunnel.Session, error) {
			made, err := yamux.Client(conn, config())
			return session{made}, err
		},
	)
}
