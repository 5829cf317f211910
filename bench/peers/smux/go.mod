module konnektor/bench/smux

go 1.24

require (
	github.com/xtaci/smux v1.5.56
	konnektor/bench/tunnel v0.0.0
)

replace konnektor/bench/tunnel => ../tunnel
