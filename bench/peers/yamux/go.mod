module konnektor/bench/yamux

go 1.24

require (
	github.com/hashicorp/yamux v0.1.2
	konnektor/bench/tunnel v0.0.0
)

replace konnektor/bench/tunnel => ../tunnel
