// Package tunnel is what the small tunnels of the benchmark have in common: they differ in their multiplexer.
//
// The control plane listens for workers and on local ports; the worker dials it, over mutual TLS 1.3, and dials what
// is behind it. Each local connection becomes a stream, which begins with the target's port.
package tunnel

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

const redial = 100 * time.Millisecond

// Stream is a connection within a session.
type Stream interface {
	io.ReadWriteCloser
	// CloseWrite ends one direction.
	CloseWrite() error
}

// Session is a multiplexed connection.
type Session interface {
	Open() (Stream, error)
	Accept() (Stream, error)
}

// Mux makes a session of a connection.
type Mux func(net.Conn) (Session, error)

// Main is the whole program, but for the multiplexer at either end.
func Main(controlPlane, worker Mux) {
	if len(os.Args) < 2 {
		log.Fatal("say control-plane or worker")
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	address := flags.String("tunnel", "", "HOST:PORT that the control plane listens on and workers dial")
	ca := flags.String("ca", "", "CA's file")
	cert := flags.String("cert", "", "certificate's file")
	key := flags.String("key", "", "key's file")
	forwards := flags.String("forward", "", "LISTEN=PORT,...: where the control plane listens, and for which port at the worker")
	sessions := flags.Int("sessions", 1, "how many sessions the worker keeps up")
	_ = flags.Parse(os.Args[2:])
	config, err := mutualTLS(*ca, *cert, *key)
	if err != nil {
		log.Fatal(err)
	}
	switch os.Args[1] {
	case "control-plane":
		err = serve(*address, config, controlPlane, strings.Split(*forwards, ","))
	case "worker":
		err = work(*address, config, worker, *sessions)
	default:
		err = errors.New("say control-plane or worker")
	}
	log.Fatal(err)
}

func mutualTLS(ca, cert, key string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", ca)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{pair},
		RootCAs:      pool,
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS13,
		// Full records from the first byte: what is sent here is mostly bulk.
		DynamicRecordSizingDisabled: true,
	}, nil
}

// The control plane

// current is the newest session.
type current struct {
	sync.Mutex
	session Session
}

func (c *current) open() (Stream, error) {
	c.Lock()
	session := c.session
	c.Unlock()
	if session == nil {
		return nil, errors.New("no worker is connected")
	}
	return session.Open()
}

func serve(address string, config *tls.Config, mux Mux, forwards []string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	newest := &current{}
	for _, forward := range forwards {
		if forward == "" {
			continue
		}
		local, target, found := strings.Cut(forward, "=")
		var port uint16
		if _, err := fmt.Sscan(target, &port); !found || err != nil {
			return fmt.Errorf("%q is not LISTEN=PORT", forward)
		}
		listening, err := net.Listen("tcp", local)
		if err != nil {
			return err
		}
		go accept(listening, func(conn net.Conn) { forwardOne(conn, newest, port) })
	}
	accept(listener, func(conn net.Conn) { welcome(tls.Server(conn, config), mux, newest) })
	return nil
}

func accept(listener net.Listener, handle func(net.Conn)) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Print(err)
			time.Sleep(10 * time.Millisecond)
			continue
		}
		go handle(conn)
	}
}

func welcome(conn *tls.Conn, mux Mux, newest *current) {
	if err := conn.Handshake(); err != nil {
		log.Print(err)
		_ = conn.Close()
		return
	}
	session, err := mux(conn)
	if err != nil {
		log.Print(err)
		return
	}
	newest.Lock()
	newest.session = session
	newest.Unlock()
	// The worker waits for this stream: only then does it know that its certificate was taken.
	if stream, err := session.Open(); err == nil {
		_, _ = stream.Write([]byte{0, 0})
		_ = stream.Close()
	}
}

func forwardOne(conn net.Conn, newest *current, port uint16) {
	stream, err := newest.open()
	if err != nil {
		log.Print(err)
		_ = conn.Close()
		return
	}
	if _, err := stream.Write(binary.BigEndian.AppendUint16(nil, port)); err != nil {
		_ = stream.Close()
		_ = conn.Close()
		return
	}
	splice(conn.(*net.TCPConn), stream)
}

// The worker

func work(address string, config *tls.Config, mux Mux, sessions int) error {
	config.ServerName, _, _ = net.SplitHostPort(address)
	up := &count{wanted: sessions, since: time.Now()}
	for range sessions {
		go func() {
			for {
				if err := workOnce(address, config, mux, up); sessions == 1 {
					log.Print(err)
				}
				time.Sleep(redial)
			}
		}()
	}
	select {}
}

func workOnce(address string, config *tls.Config, mux Mux, up *count) error {
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	session, err := mux(conn)
	if err != nil {
		return err
	}
	connected := false
	defer func() {
		if connected {
			up.add(-1)
		}
	}()
	for {
		stream, err := session.Accept()
		if err != nil {
			return err
		}
		if !connected {
			connected = true
			up.add(1)
		}
		go serveOne(stream)
	}
}

func serveOne(stream Stream) {
	var header [2]byte
	if _, err := io.ReadFull(stream, header[:]); err != nil {
		_ = stream.Close()
		return
	}
	port := binary.BigEndian.Uint16(header[:])
	if port == 0 {
		_ = stream.Close()
		return
	}
	conn, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(port)})
	if err != nil {
		log.Print(err)
		_ = stream.Close()
		return
	}
	splice(conn, stream)
}

// count says on standard output how long it took until all sessions were up, each time they are.
type count struct {
	sync.Mutex
	up, wanted int
	since      time.Time
}

func (c *count) add(change int) {
	c.Lock()
	defer c.Unlock()
	if c.up == c.wanted {
		c.since = time.Now()
	}
	c.up += change
	if c.up == c.wanted {
		fmt.Printf("connected %d in %.6f s\n", c.up, time.Since(c.since).Seconds())
	}
}

// splice joins the two until both directions have ended.
func splice(conn *net.TCPConn, stream Stream) {
	done := make(chan struct{})
	go func() {
		_, err := io.Copy(stream, conn)
		if err != nil {
			_ = stream.Close()
		} else {
			_ = stream.CloseWrite()
		}
		close(done)
	}()
	if _, err := io.Copy(conn, stream); err != nil {
		_ = conn.Close()
	} else {
		_ = conn.CloseWrite()
	}
	<-done
	_ = stream.Close()
	_ = conn.Close()
}
