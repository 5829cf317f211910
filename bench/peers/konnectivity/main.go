// Command konnectivity lets clients that know nothing of proxies use Konnectivity: it listens on local ports, and asks
// the proxy server for each connection by HTTP CONNECT on its Unix socket, as kube-apiserver does. It is on the client's
// side: its time and memory are not counted as the tunnel's.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"strings"
	"syscall"
)

// Linux's number; package syscall does not have it.
const reusePort = 15

// Several of these processes share their ports: a pair of connections that the kernel splices takes six descriptors.
var shared = net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) (err error) {
	if failed := conn.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, reusePort, 1)
	}); failed != nil {
		return failed
	}
	return err
}}

func main() {
	uds := flag.String("uds", "", "Unix socket of the proxy server")
	forwards := flag.String("forward", "", "LISTEN=TARGET,...")
	flag.Parse()
	for _, forward := range strings.Split(*forwards, ",") {
		local, target, _ := strings.Cut(forward, "=")
		listener, err := shared.Listen(context.Background(), "tcp", local)
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					log.Fatal(err)
				}
				go serve(conn.(*net.TCPConn), *uds, target)
			}
		}()
	}
	select {}
}

func serve(conn *net.TCPConn, uds, target string) {
	defer conn.Close()
	dialed, err := net.Dial("unix", uds)
	if err != nil {
		log.Print(err)
		return
	}
	proxy := dialed.(*net.UnixConn)
	defer proxy.Close()
	if _, err := fmt.Fprintf(proxy, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target); err != nil {
		log.Print(err)
		return
	}
	// One byte at a time, so that nothing of what follows is taken and the kernel can splice it.
	head, one := []byte{}, make([]byte, 1)
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if _, err := proxy.Read(one); err != nil || len(head) > 4096 {
			log.Printf("%q: %v", head, err)
			return
		}
		head = append(head, one[0])
	}
	if !bytes.Contains(head, []byte(" 200 ")) {
		log.Printf("%q", head)
		return
	}
	done := make(chan struct{})
	go func() {
		_, _ = io.Copy(proxy, conn)
		_ = proxy.CloseWrite()
		close(done)
	}()
	_, _ = io.Copy(conn, proxy)
	_ = conn.CloseWrite()
	<-done
}
